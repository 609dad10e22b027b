"""A config and the jobs it describes: LightningCLI, building one branch at a time."""

import copy
import logging
import warnings
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from stl_lightning.augment import PixelAugment
from stl_lightning.datamodule import SpectralDataModule
from stl_lightning.ensemble.fit import find_candidates
from stl_lightning.ensemble.options import EnsembleOptions
from stl_lightning.errors import ConfigError, RunError
from stl_lightning.module import BranchModule, NetworkFactory
from stl_lightning.paths import RunPaths
from stl_lightning.ranks import RankInfo
from stl_lightning.run import Run, RunOptions, claim_run
from stl_lightning.strategy import pick_device
from stl_lightning.tracking import TrackingOptions
from stl_lightning.training import BranchJob, check_trainer_settings


class SpectralCLI(LightningCLI):
    """Parses a config and builds the job of any of its branches. Nothing is instantiated before it is asked for."""

    def __init__(self, args: list[str], command: str, description: str = "") -> None:
        self._data: SpectralDataModule | None = None
        quiet()
        super().__init__(
            BranchModule,
            SpectralDataModule,
            save_config_callback=None,
            # The generated usage lists every setting on 60 lines, above the one line that says what is wrong.
            parser_kwargs={
                "prog": f"stl {command}",
                "usage": f"stl {command} [--config FILE.yaml] [--key.subkey VALUE ...]",
                "description": description,
            },
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        help_text = "The seed of a run: split, data order, augmentation, weights and dropout of each branch."
        parser.add_argument("--seed_everything", type=NonNegativeInt, default=0, help=help_text)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_lightning_class_args(BranchModule, "model")
        # Built by the property `data`, once for all branches of this process, and not together with each module.
        parser.add_class_arguments(SpectralDataModule, "data", instantiate=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        parser.add_class_arguments(TrackingOptions, "tracking")
        parser.add_class_arguments(EnsembleOptions, "ensemble")
        help_text = "Network that `stl baseline` trains on the whole image; null takes the class of the branches."
        parser.add_argument("--baseline.network", type=NetworkFactory | None, default=None, help=help_text)
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

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
            self._data = SpectralDataModule(**settings | {"augment": PixelAugment(**settings["augment"])})
        return self._data

    def check(self) -> None:
        """Everything that can be found wrong before a file is written or an image is read.

        Raises: ConfigError, also from the constructors of the network and the optimiser.
        """
        check_trainer_settings(dict(self.config.trainer))
        pick_device(self.config.trainer.accelerator, local_rank=0)
        built = self.parser.instantiate(self.config)  # constructs the options, which check themselves
        ensemble = self.ensemble_options
        find_candidates(ensemble.weighting, ensemble.space, self.data.n_branches, self.data.n_classes)
        module = built.model.build(self.data.in_shape, self.data.n_classes, self.data.seed, self.data.branch)
        module.configure_optimizers()

    def claim(self) -> Run:
        """Open the run directory for this config, if nothing is wrong with it."""
        self.check()
        return claim_run(self.options.paths, self.data.agreement())

    def owned_branches(self) -> tuple[int, ...]:
        """The branches that this process trains: `run.branches`, or those of its rank."""
        asked = self.options.branches
        if asked is None:
            return RankInfo.detect().branches(self.data.n_branches)
        if not asked or not all(0 <= branch < self.data.n_branches for branch in asked):
            raise ConfigError(f"run.branches: expected numbers from 0 to {self.data.n_branches - 1}, got {asked}")
        return tuple(asked)

    def job(self, run: Run, branch: int) -> BranchJob:
        """Everything needed to train or evaluate one branch."""
        config = copy.deepcopy(self.config)
        config.data.branch = branch
        built = self.parser.instantiate(config)
        data = copy.copy(self.data)
        data.select_branch(branch)
        return BranchJob(
            run,
            data,
            built.model,
            dict(built.trainer),
            self.parser.dump(config, skip_unset=False),
            self.options,
            self.tracking,
            RankInfo.detect().local_rank,
        )

    def as_baseline(self) -> "SpectralCLI":
        """The same config for the conventional network: one branch, whose one slice is the whole image."""
        self.config.data.update(Namespace(reorganisation="polyphase", block=1, transform="identity", pad=None))
        self.config.data.slices_per_branch = 1
        if self.config.baseline.network is not None:
            self.config.model.network = self.config.baseline.network
        self.config.run.branches = None
        return self


def kept_cli(paths: RunPaths, command: str, branch: int | None = None) -> SpectralCLI:
    """The config that a branch of a run was trained with; any branch's if none is named.

    Raises: RunError if there is none.
    """
    folder = "*" if branch is None else paths.branch(branch).folder.name
    kept = sorted(paths.folder.glob(f"branches/{folder}/config.yaml"))
    if not kept:
        which = "no branch" if branch is None else f"branch {branch} is not"
        raise RunError(f"{paths.folder}: {which} begun (no config.yaml); train it with `stl fit`")
    return SpectralCLI(["--config", str(kept[0])], command)


def jobs_of_run(run: Run) -> list[BranchJob]:
    """The jobs of those branches of an existing run that were begun, from the configs it keeps."""
    begun = [branch for branch in range(run.settings["n_branches"]) if run.paths.branch(branch).config.exists()]
    return [kept_cli(run.paths, "ensemble", branch).job(run, branch) for branch in begun]


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
