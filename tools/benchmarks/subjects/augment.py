"""What augmentation inside slices takes of a training step: the same training with it and without it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.compare import Pair, rows
from benchmarks.plain import BATCH
from benchmarks.setting import Setting
from benchmarks.stl import arguments, training

NETWORKS: dict[str, tuple[list[str], int]] = {
    "MLP": (["--model.network.class_path=stl_lightning.networks.MLP", "--model.network.init_args={width: 49}"], 200),
    "ConvNet": ([], 8),
}  # settings, steps of a repetition
NONE: dict[str, Any] = {"crop_pad": 0, "flip": False, "aligned": True}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "crop and flip": {"crop_pad": 4, "flip": True},
    "erase": {"erase": 0.5},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
}


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(2)
    chosen = setting.choose(AUGMENTATIONS, {name: AUGMENTATIONS[name] for name in ("crop and flip",)})
    for device in setting.devices:
        for network, (settings, steps) in setting.choose(NETWORKS, {"MLP": NETWORKS["MLP"]}).items():
            data = setting.data("cifar10", steps * BATCH)
            stl = partial(arguments, setting, "cifar10.yaml", data, device, "--data.transform=dct2", *settings)
            names = {f"{network}, {name}": NONE | options for name, options in chosen.items()}
            without = f"{network}, no augmentation"
            sides = {
                name: training(stl(*(f"--data.augment.{key}={value}" for key, value in options.items())), data.n)
                for name, options in (names | {without: NONE}).items()
            }
            values = setting.take_turns(sides, threads)
            for row in rows(values, [Pair(name, without) for name in names], "samples x branches / s", device=device):
                share = {"share_of_step": 1 - row["ratio"]} if "ratio" in row else {}
                yield row | share | {"threads": threads, "data": data.origin}
