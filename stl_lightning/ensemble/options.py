"""How an ensemble is made of its members, as the user sets it."""

from dataclasses import dataclass

from stl_lightning.errors import ConfigError


@dataclass
class EnsembleOptions:
    """Weights of the members in the sum, fitted on the validation split.

    Args:
        weighting: A row of `WEIGHTINGS`, or auto: the best by cross-validation inside the validation split.
        space: What is summed: logits, log_prob or prob, or auto.
        n_folds: Folds of that cross-validation.
        flips: Average each member's logits over the image and its mirror image, on every split; the baseline's too.
    """

    weighting: str = "auto"
    space: str = "auto"
    n_folds: int = 5
    flips: bool = False

    def __post_init__(self) -> None:
        if self.n_folds < 2:
            raise ConfigError(f"ensemble.n_folds: expected 2 or more, got {self.n_folds}")
