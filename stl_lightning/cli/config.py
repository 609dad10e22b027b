"""A config and the jobs it describes: LightningCLI, building one branch at a time."""

import copy
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any, Literal

from jsonargparse import Namespace
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from stl_lightning.augment import Augment
from stl_lightning.cli.parser import SettingsParser
from stl_lightning.datamodule import SpectralDataModule
from stl_lightning.ensemble.fit import check_n_folds, find_candidates
from stl_lightning.ensemble.options import EnsembleOptions
from stl_lightning.errors import ConfigError
from stl_lightning.module import BranchModule
from stl_lightning.networks import NetworkFactory
from stl_lightning.paths import RunPaths
from stl_lightning.ranks import RankInfo
from stl_lightning.run import Run, RunOptions, claim_run
from stl_lightning.strategy import pick_device
from stl_lightning.tracking import TrackingOptions
from stl_lightning.training import BranchJob, check_schedule, check_trainer_settings, different_settings, try_trainer

PASSED_ON = (
    "data.root", "data.store", "data.num_workers", "data.eval_batch_size", "trainer.accelerator", "tracking.",
    "ensemble.",
)  # fmt: skip


Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", 2**32 - 1)])  # what NumPy takes


class SpectralCLI(LightningCLI):
    """Parses a config and builds the job of any of its branches. Nothing is instantiated before it is asked for.

    What cannot be parsed ends the process, as in any command; with `exits` false, it is an ArgumentError.
    """

    def __init__(self, args: list[str], command: str, description: str = "", exits: bool = True) -> None:
        self._data: SpectralDataModule | None = None
        quiet()
        # Classes of the user's own lie in the folder that this is called from. Not "", which Python has there for some
        # callers: a config is read from within its own folder.
        if (here := os.getcwd()) not in sys.path:
            sys.path.insert(0, here)
        super().__init__(
            BranchModule,
            SpectralDataModule,
            save_config_callback=None,
            parser_class=SettingsParser,
            # The generated usage lists every setting on 60 lines, above the one line that says what is wrong.
            parser_kwargs={
                "prog": f"stl {command}",
                "usage": f"stl {command} [--config FILE.yaml] [--key.subkey VALUE ...]",
                "description": description,
                "allow_abbrev": False,  # a misspelt setting must not be taken for another
                "exit_on_error": exits,
            },
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        help_text = "The seed of a run: split, data order, augmentation, weights and dropout of each branch."
        parser.add_argument("--seed_everything", type=Seed, default=0, help=help_text)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """In the order of `--help`: what is ours first, the hundred lines of Lightning's Trainer last."""
        parser.add_class_arguments(RunOptions, "run")
        # Built by the property `data`, once for all branches of this process, and not together with each module.
        parser.add_class_arguments(SpectralDataModule, "data", instantiate=False)
        parser.add_class_arguments(EnsembleOptions, "ensemble")
        parser.add_class_arguments(TrackingOptions, "tracking")
        help_text = "Network that `stl baseline` trains on the whole image; null takes the class of the branches."
        parser.add_argument("--baseline.network", type=NetworkFactory | None, default=None, help=help_text)
        parser.add_lightning_class_args(BranchModule, "model")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        if self.config.model.network_of is not None:
            # YAML reads a single branch as a number; kept configs are compared key by key.
            self.config.model.network_of = {str(key): value for key, value in self.config.model.network_of.items()}

    def instantiate_classes(self) -> None:
        """Nothing yet: a process may own several branches, and each gets a module and a trainer of its own."""

    @property
    def options(self) -> RunOptions:
        return RunOptions(**self.config.run.as_dict())

    @property
    def ensemble_options(self) -> EnsembleOptions:
        return EnsembleOptions(**self.config.ensemble.as_dict())

    @property
    def tracking(self) -> TrackingOptions:
        return TrackingOptions(**self.config.tracking.as_dict())

    @property
    def data(self) -> SpectralDataModule:
        """The data of the run, shared by all branches of this process so that images are read once."""
        if self._data is None:
            settings = self.config.data.as_dict()
            self._data = SpectralDataModule(**settings | {"augment": Augment(**settings["augment"])})
        return self._data

    def check(self) -> None:
        """Everything that can be found wrong before a file is written.

        Raises: ConfigError and DataError, also from the constructors of the network and the optimiser.
        """
        check_trainer_settings(dict(self.config.trainer))
        pick_device(self.config.trainer.accelerator, local_rank=0)
        built = self.parser.instantiate(self.config)  # constructs the options, which check themselves
        try_trainer(_with_list(dict(built.trainer)))
        ensemble = self.ensemble_options
        find_candidates(ensemble.weighting, ensemble.space, self.data.n_branches, self.data.n_classes)
        if ensemble.flips:
            self.data.check_mirror()
        for branch in [*built.model.networks.designs(self.data.n_branches), self.data.branch]:
            data = self._data_of(branch)
            module = built.model.build(data.in_shape, data.n_classes, data.seed, [branch])
            module.check_output(data.in_shape, data.n_classes)
        made, data = module.configure_optimizers(), self.data
        data.check(self.owned_branches())
        check_n_folds(ensemble.n_folds, data.n_val_images)
        if module.scheduler_factory is not None:
            _, (scheduler,) = made
            check_schedule(scheduler, module.lr_interval, dict(built.trainer), data.n_train_images, data.batch_size)

    def claim(self) -> Run:
        """Open the run directory for this config, if nothing is wrong with it."""
        self.check()
        return claim_run(self.options.paths, self.data.agreement())

    def owned_branches(self) -> tuple[int, ...]:
        """The branches that this process trains: its share of `run.branches`, of `data.branch`, or of all."""
        asked = self.options.branches
        if asked is None and self.config.data.branch is not None:
            asked = [self.config.data.branch]
        if asked is None:
            return RankInfo.detect().branches(self.data.n_branches)
        if not asked or not all(0 <= branch < self.data.n_branches for branch in asked):
            raise ConfigError(f"run.branches: expected numbers from 0 to {self.data.n_branches - 1}, got {asked}")
        return RankInfo.detect().share(list(dict.fromkeys(asked)))

    def job(self, run: Run, branch: int, job_type: Literal["branch", "baseline"] = "branch") -> BranchJob:
        """Everything needed to train or evaluate one branch."""
        config = copy.deepcopy(self.config)
        config.data.branch = branch
        built = self.parser.instantiate(config)
        return BranchJob(
            run=run,
            data=self._data_of(branch),
            module=built.model,
            trainer_settings=_with_list(dict(built.trainer)),
            config_yaml=self.parser.dump(config, skip_unset=False),
            options=self.options,
            tracking=self.tracking,
            local_rank=RankInfo.detect().local_rank,
            job_type=job_type,
        )

    def _data_of(self, branch: int) -> SpectralDataModule:
        """Of one branch; images that were read already are shared."""
        data = copy.copy(self.data)
        data.select_branches([branch])
        return data

    def as_baseline(self) -> "SpectralCLI":
        """The same config for the conventional network: one branch, whose one slice is the whole image."""
        whole = {"reorganisation": "polyphase", "block": 1, "transform": "identity", "pad": None, "branch": None}
        whole["store"] = None  # which holds slices and no images
        self.config.data.update(Namespace(slices_per_branch=1, common_slices=None, **whole))
        if self.config.baseline.network is not None:
            self.config.model.network = self.config.baseline.network
        self.config.model.network_of = None
        self.config.run.branches = None
        return self

    def where_it_runs(self) -> list[str]:
        """The settings that another process needs to find the same data and devices, as command-line options."""
        flat = {key: value for key, value in vars(self.config.as_flat()).items() if key.startswith(PASSED_ON)}
        return [f"--{key}={value}" for key, value in flat.items() if value is not None]

    def share_data(self, other: "SpectralCLI") -> None:
        """Use the data of another config of the same run, so that images are read and listed once."""
        ours, theirs = (cli.config.data.as_dict() | {"branch": None} for cli in (self, other))
        if ours == theirs:
            self._data = other.data


def _with_list(trainer: dict[str, Any]) -> dict[str, Any]:
    """The settings with a single callback, which Lightning takes too, as a list of one."""
    callbacks = trainer.get("callbacks") or []
    return trainer | {"callbacks": callbacks if isinstance(callbacks, list | tuple) else [callbacks]}


def kept_cli(paths: RunPaths, branch: int, overrides: Sequence[str] = ()) -> SpectralCLI:
    """The config that a branch of a run was trained with, and what is different now about where it runs.

    Raises: ConfigError if the config cannot be read, or an override is unknown or would change what the branch
    computes.
    """
    file = str(paths.branch(branch).config)
    as_trained = _parsed(["--config", file], f"{file}: ")
    if not overrides:  # parsing takes a third of a second
        return as_trained
    cli = _parsed(["--config", file, *overrides])
    changed = different_settings(*(each.parser.dump(each.config, skip_unset=False) for each in (as_trained, cli)))
    if changed:
        raise ConfigError(f"{', '.join(changed)}: a finished run keeps these settings; expected them to be left out")
    return cli


def _parsed(args: list[str], prefix: str = "") -> SpectralCLI:
    """For a caller from Python, whom an error must not end. Raises: ConfigError, whose text begins with `prefix`."""
    try:
        return SpectralCLI(args, "ensemble", exits=False)
    except (ArgumentError, UnicodeDecodeError) as error:
        raise ConfigError(f"{prefix}{error}") from error


def clis_of_run(run: Run, overrides: Sequence[str] = ()) -> dict[int, SpectralCLI]:
    """The configs of those branches of an existing run that were begun; their data are shared."""
    begun = [branch for branch in range(run.settings["n_branches"]) if run.paths.branch(branch).config.exists()]
    clis = {branch: kept_cli(run.paths, branch, overrides) for branch in begun}
    for branch in begun[1:]:
        clis[branch].share_data(clis[begun[0]])
    return clis


def jobs_of_run(run: Run, overrides: Sequence[str] = ()) -> list[BranchJob]:
    """The jobs of those branches of an existing run that were begun."""
    return [cli.job(run, branch) for branch, cli in clis_of_run(run, overrides).items()]


def quiet() -> None:
    """Silence what Lightning says of things that are meant to be so here: one device of many, a folder in use."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*srun.*is available.*",
        ".*smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*GPU available but not used.*",
        ".*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)
