"""What can be reproduced: a table of experiments, each with the variants that stand beside its headline."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

Settings = tuple[str, ...]

RECIPE = "recipe"  # what the row of the recipe itself is called
PARTS = ("branch", "all_branches", "baseline")  # of the costs of a recipe
COLUMNS = ("mean", "highest", "ensemble", "baseline")  # of the poster's Table 1


@dataclass(frozen=True)
class Variant:
    """The same recipe with some settings changed. `seeds`: fewer than the experiment's, where it is not the headline.

    `only_baseline`: trains the conventional network and no branch. `note`: ends its title, such as ", 2 epochs".
    """

    title: str
    settings: Settings = ()
    seeds: int | None = None
    only_baseline: bool = False
    note: str = ""


@dataclass(frozen=True)
class Experiment:
    """A recipe (a config and what is set beside it), how many seeds it takes, and what it is compared with.

    `folder`: where its images lie inside the folder of all data sets.
    `poster`: accuracy in percent in its Table 1, a number for each of COLUMNS.
    `goal`: what the ensemble's accuracy is to reach.
    """

    title: str
    group: str  # what the command line calls it, with others of the same data
    config: str
    seeds: int
    settings: Settings = ()
    folder: str = ""
    poster: tuple[float, float, float, float] | None = None
    poster_on: str = ""  # which data
    goal: float | None = None
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, Variant | None]:
        """The recipe itself, the conventional network that it is compared with, and the variants."""
        return {RECIPE: None, "baseline": Variant("the conventional network", only_baseline=True), **self.variants}


def controls(n_seeds: int, r: int = 1, also: Settings = (), note: str = "") -> dict[str, Variant]:
    """What shows how much the transform and the split contribute: the same code, the same networks.

    The cost is the same too, but for networks on the pixel average beside branches that read several slices.
    r: slices that a branch of the experiment reads. also: settings of every control, which `note` names.
    """
    common = ("--data.reorganisation=polyphase", "--data.transform=dct2")
    common += ("--data.slices_per_branch=1",) if r > 1 else ()
    same = {"same-data": ("the pixel average", 1)} | ({"same-slices": (f"the same {r} slices", r)} if r > 1 else {})
    changed = {
        "identity": ("no transform", ("--data.transform=identity",)),
        "random": ("random orthogonal transform", ("--data.transform=random",)),
        **{
            key: (f"B networks on {what}", (*common, f"--data.common_slices={list(range(n))}"))
            for key, (what, n) in same.items()
        },
    }
    return {key: Variant(title, (*settings, *also), n_seeds, note=note) for key, (title, settings) in changed.items()}


def unsplit(n_seeds: int, network: str, **options: object) -> dict[str, Variant]:
    """The conventional network with as many multiply-adds as all branches together."""
    settings = [f"--baseline.network=stl_lightning.networks.{network}"]
    settings += [f"--baseline.network.init_args.{name}={value}" for name, value in options.items()]
    return {
        "unsplit": Variant("conventional network of equal multiply-adds", tuple(settings), n_seeds, only_baseline=True)
    }


def shorter(n_seeds: int, also: Settings, note: str) -> dict[str, Variant]:
    """The conventional network beside variants in fewer epochs."""
    return {"baseline-short": Variant("the conventional network", also, n_seeds, only_baseline=True, note=note)}


def reads(n_seeds: int, *numbers: int, also: Settings = (), note: str = "") -> dict[str, Variant]:
    """Branches that read their own slice and the lowest-frequency others."""
    return {
        f"reads-{r}": Variant(f"{slices(r)} a branch", (f"--data.slices_per_branch={r}", *also), n_seeds, note=note)
        for r in numbers
    }


def aligned(n_seeds: int, crop_pad: int, *numbers: int, also: Settings = (), note: str = "") -> dict[str, Variant]:
    """The same with crops by whole blocks, which a branch can make of its slices alone: accuracy against storage.

    crop_pad: at most so many pixels, a multiple of the block; so it may be more than the recipe's.
    """
    crops: Settings = ("--data.augment.aligned=true", f"--data.augment.crop_pad={crop_pad}")
    return {
        f"aligned-{r}": Variant(
            f"{slices(r)} a branch and no image, crops by whole blocks",
            (f"--data.slices_per_branch={r}", *crops, *also),
            n_seeds,
            note=note,
        )
        for r in numbers
    }


def slices(r: int) -> str:
    return f"{r} {'slices' if r > 1 else 'slice'}"


def sizes(n_seeds: int, network_of: Mapping[str, object], also: Settings = (), note: str = "") -> dict[str, Variant]:
    """Larger networks where the energy is, smaller ones where it is not; all together as large as equal ones."""
    settings = (f"--model.network_of={json.dumps(network_of)}", "--data.slices_per_branch=1", *also)
    return {"sizes": Variant("1 slice a branch, sizes by energy", settings, n_seeds, note=note)}


FAST = ("--trainer.precision=bf16-mixed", "--model.channels_last=true")
# Where controls as long as the recipe would take too long: they, and the recipe beside them, in fewer epochs.
TWO_EPOCHS = ("--trainer.max_epochs=2", "--model.lr_scheduler.init_args.total_steps=352")  # of cifar10-best
THREE_EPOCHS = ("--trainer.max_epochs=3", "--model.lr_scheduler.init_args.T_max=3")  # of mnist-conv

EXPERIMENTS = {
    "digits": Experiment(
        "Digits, B = 4",
        "digits",
        "configs/digits.yaml",
        seeds=3,
        variants=controls(3) | unsplit(3, "MLP", depth=3, width=119),
    ),
    "mnist-poster": Experiment(
        "MNIST, B = 16, the poster's settings",
        "mnist",
        "configs/mnist.yaml",
        seeds=5,
        poster=(82.74, 96.32, 98.36, 98.71),
        poster_on="MNIST, B = 16",
        variants=controls(3) | unsplit(3, "MLP", depth=8, width=158),
    ),
    "cifar10-poster": Experiment(
        "CIFAR-10, B = 4, the poster's settings in 2 epochs",
        "cifar10",
        "configs/cifar10.yaml",
        seeds=3,
        settings=("--trainer.max_epochs=2", *FAST),
        poster=(81.67, 85.54, 89.64, 91.86),
        poster_on="CIFAR-10, B = 4, in 300 epochs",
        variants=controls(1),
    ),
    "photos-poster": Experiment(
        "2,000 photographs, B = 16, 10 epochs",
        "photos",
        "configs/imagenet.yaml",
        seeds=2,
        # 1,400 photographs of 10 classes to train with, not 1.2 million: 64x64 pixels, small batches. With the poster's
        # learning rate of 0.1 no branch learns more than chance in so few steps.
        settings=(
            *("--data.source=imagefolder", "--data.image_size=64", "--data.val_size=200", "--data.num_workers=0"),
            *("--data.batch_size=64", "--data.eval_batch_size=100", "--run.epoch_logits=200", *FAST),
            *("--trainer.max_epochs=10", "--model.lr_scheduler.init_args.step_size=4"),
            "--model.optimizer.init_args.lr=0.001",
        ),
        folder="imagenette-small",
        poster=(45.48, 56.82, 61.24, 62.62),
        poster_on="ImageNet-1K, B = 16",
        variants=controls(1),
    ),
    "mnist-best": Experiment(
        "MNIST, B = 16, fully connected branches",
        "mnist",
        "configs/mnist-best.yaml",
        seeds=3,
        goal=98.9,
        variants=controls(1, 4)
        | reads(1, 1, 2, 8, 16)
        | aligned(1, 4, 4)
        | sizes(1, {"0-2": {"width": 400}, "3-15": {"width": 208}}),
    ),
    "mnist-conv": Experiment(
        "MNIST, B = 16, convolution branches",
        "mnist",
        "configs/mnist-conv.yaml",
        seeds=3,
        goal=99.3,
        variants=controls(1, 4, THREE_EPOCHS, ", 3 epochs")
        | reads(1, 4, also=THREE_EPOCHS, note=", 3 epochs")
        | aligned(1, 4, 1, 2, 4, also=THREE_EPOCHS, note=", 3 epochs")
        | shorter(1, THREE_EPOCHS, ", 3 epochs"),
    ),
    "cifar10-best": Experiment(
        "CIFAR-10, B = 4, convolution branches",
        "cifar10",
        "configs/cifar10-best.yaml",
        seeds=3,
        goal=92.0,
        variants=controls(1, 3, TWO_EPOCHS, ", 2 epochs")
        | reads(1, 1, 2, 3, 4, also=TWO_EPOCHS, note=", 2 epochs")
        | aligned(1, 2, 1, 3, also=TWO_EPOCHS, note=", 2 epochs")
        | sizes(1, {"0": {"widths": [80, 160, 320]}, "3": {"widths": [48, 80, 160]}}, TWO_EPOCHS, ", 2 epochs")
        | shorter(1, TWO_EPOCHS, ", 2 epochs"),
    ),
}
GROUPS = sorted({experiment.group for experiment in EXPERIMENTS.values()})
N_TEST = {"digits": 359, "mnist": 10_000, "cifar10": 10_000, "photos": 400}  # test images
