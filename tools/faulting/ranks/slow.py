"""The network of the runs that faults are done to."""

import time
from typing import Any

from torch import Tensor

from stl_lightning.networks import MLP


class SlowMLP(MLP):
    """An MLP whose training steps wait `step_s` seconds, in which the processor is free for others."""

    def __init__(self, in_shape: tuple[int, int, int], n_classes: int, step_s: float = 0.0, **options: Any) -> None:
        super().__init__(in_shape, n_classes, **options)
        self.step_s = step_s

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.step_s)
        return super().forward(x)
