"""The outputs of trained branches: logits of one split, computed once and kept beside the weights they came from."""

from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stl_lightning.checkpoint import fingerprint
from stl_lightning.datamodule import Split
from stl_lightning.ensemble.metrics import METRICS
from stl_lightning.errors import CheckpointError
from stl_lightning.loaders import ResumableLoader
from stl_lightning.module import BranchModule
from stl_lightning.paths import write_atomically
from stl_lightning.training import BranchJob, load_best, predicting_trainer


@dataclass(frozen=True)
class Outputs:
    """Logits (n k) of one branch, or (b n k) of several, and the labels (n,) of the same images."""

    logits: Tensor
    labels: Tensor


def scores(outputs: Outputs) -> dict[str, float]:
    """Every row of `METRICS`: accuracy and calibration error as shares, negative log-likelihood in nats."""
    log_probs = outputs.logits.log_softmax(-1)
    return {name: float(score(log_probs, outputs.labels)) for name, score in METRICS.items()}


def branch_outputs(job: BranchJob, split: Split, flips: bool = False) -> Outputs:
    """The outputs of the best weights of a branch on one split, from the cache if it is of these weights.

    With `flips`, the mean of the logits of each image and of its mirror image.

    Raises: CheckpointError if the branch has no usable `best.ckpt`.
    """
    if not job.paths.best.exists():
        raise CheckpointError(f"there is no checkpoint {job.paths.best}; train the branch with `stl fit`")
    return _read(job, split, flips) or compute_outputs(job, split, flips)


def compute_outputs(job: BranchJob, split: Split, flips: bool = False) -> Outputs:
    """Run the branch over one split, with the device and precision of its training, and keep the outputs.

    Raises: CheckpointError if the branch has no usable `best.ckpt`, or its outputs are not finite; ConfigError for
    `flips` of stored slices that do not determine those of the mirror image.
    """
    module = load_best(job)
    mirrored = job.data.loader(split, mirrored=True) if flips else None
    outputs = _predict(job, module, job.data.loader(split))
    if mirrored is not None:
        of_mirror = _predict(job, module, mirrored)
        outputs = Outputs((outputs.logits + of_mirror.logits) / 2, outputs.labels)
    if not outputs.logits.isfinite().all():
        raise CheckpointError(f"{job.paths.best} gives {split} outputs that are not finite; delete it to train again")
    tensors = {"logits": outputs.logits.contiguous(), "labels": outputs.labels}
    blob = safetensors.torch.save(tensors, metadata=_origin(job, split, flips))
    write_atomically(job.paths.logits(split), lambda file: file.write(blob))
    return outputs


def _predict(job: BranchJob, module: BranchModule, loader: ResumableLoader) -> Outputs:
    batches = predicting_trainer(job).predict(module, loader)
    assert batches, "a split has at least one batch"
    logits, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    return Outputs(logits.float().cpu(), labels.cpu())


def _read(job: BranchJob, split: Split, flips: bool) -> Outputs | None:
    """The cached outputs, unless they are of other weights or damaged: then they are computed again."""
    origin = _origin(job, split, flips)
    try:
        with safe_open(job.paths.logits(split), framework="pt") as file:
            if file.metadata() == origin:
                return Outputs(file.get_tensor("logits"), file.get_tensor("labels"))
    except (SafetensorError, OSError):
        return None
    return None


def _origin(job: BranchJob, split: Split, flips: bool) -> dict[str, str]:
    """What the logits were computed from: equal origin, equal logits."""
    of_weights = {"checkpoint": fingerprint(job.paths.best), "settings": job.run.hash}
    return {"split": split, "flips": str(flips)} | of_weights
