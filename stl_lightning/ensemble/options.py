"""How an ensemble is made of its members, as the user sets it."""

from dataclasses import dataclass


@dataclass
class EnsembleOptions:
    """Weights of the members in the sum, fitted on the validation split.

    Args:
        weighting: A row of `WEIGHTINGS`, or auto: the best by cross-validation inside the validation split.
        space: What is summed: logits, log_prob or prob, or auto.
        n_folds: Folds of that cross-validation.
    """

    weighting: str = "auto"
    space: str = "auto"
    n_folds: int = 5
