"""What can be reproduced: a table of experiments, each with the variants that stand beside its headline."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """The same recipe with some settings changed. `seeds`: fewer than the experiment's, where it is not the headline.

    `only_baseline`: trains the conventional network and no branch.
    """

    title: str
    settings: tuple[str, ...] = ()
    seeds: int | None = None
    only_baseline: bool = False


@dataclass(frozen=True)
class Experiment:
    """A recipe (a config and what is set beside it), how many seeds it takes, and what it is compared with.

    `folder`: where its images lie inside the folder of all data sets.
    `poster`: accuracy in percent of the mean branch, the highest, the ensemble and the baseline in its Table 1.
    `goal`: what the ensemble's accuracy is to reach.
    """

    title: str
    group: str  # what the command line calls it, with others of the same data
    config: str
    seeds: int
    settings: tuple[str, ...] = ()
    folder: str = ""
    poster: tuple[float, float, float, float] | None = None
    goal: float | None = None
    variants: Mapping[str, Variant] = field(default_factory=dict)


def controls(n_seeds: int) -> dict[str, Variant]:
    """What shows how much the transform and the split contribute: the same code, the same networks, the same cost."""
    average = ("--data.reorganisation=polyphase", "--data.transform=dct2", "--data.common_slices=[0]")
    return {
        "identity": Variant("no transform", ("--data.transform=identity",), n_seeds),
        "random": Variant("random orthogonal transform", ("--data.transform=random",), n_seeds),
        "same-data": Variant("B networks on the pixel average", average, n_seeds),
    }


def unsplit(n_seeds: int, network: str, **options: object) -> dict[str, Variant]:
    """The conventional network with as many multiply-adds as all branches together."""
    settings = [f"--baseline.network=stl_lightning.networks.{network}"]
    settings += [f"--baseline.network.init_args.{name}={value}" for name, value in options.items()]
    return {"unsplit": Variant("unsplit network of equal cost", tuple(settings), n_seeds, only_baseline=True)}


def reads(n_seeds: int, *numbers: int) -> dict[str, Variant]:
    """Branches that read their own slice and the lowest-frequency others."""
    return {f"reads-{r}": Variant(f"{r} slices a branch", (f"--data.slices_per_branch={r}",), n_seeds) for r in numbers}


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
        variants=controls(5) | unsplit(5, "MLP", depth=8, width=158),
    ),
    "cifar10-best": Experiment(
        "CIFAR-10, B = 4, an hour on two cores",
        "cifar10",
        "configs/cifar10-best.yaml",
        seeds=3,
        goal=92.0,
    ),
}
GROUPS = sorted({experiment.group for experiment in EXPERIMENTS.values()})
