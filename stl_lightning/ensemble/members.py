"""The outputs of trained branches: logits of one split, computed once and kept beside the weights they came from."""

from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stl_lightning.checkpoint import fingerprint
from stl_lightning.datamodule import Split
from stl_lightning.errors import CheckpointError
from stl_lightning.paths import write_atomically
from stl_lightning.training import BranchJob, load_best, predicting_trainer


@dataclass(frozen=True)
class Outputs:
    """Logits (n k) of one branch and the labels (n,) of the same images."""

    logits: Tensor
    labels: Tensor


def branch_outputs(job: BranchJob, split: Split) -> Outputs:
    """The outputs of the best weights of a branch on one split, from the cache if it is of these weights.

    Raises: CheckpointError if the branch has no usable `best.ckpt`.
    """
    if not job.paths.best.exists():
        raise CheckpointError(f"there is no checkpoint {job.paths.best}; train the branch with `stl fit`")
    return _read(job, split) or compute_outputs(job, split)


def compute_outputs(job: BranchJob, split: Split) -> Outputs:
    """Run the branch over one split, with the device and precision of its training, and keep the outputs.

    Raises: CheckpointError if the branch has no usable `best.ckpt`, or its outputs are not finite.
    """
    module = load_best(job)
    batches = predicting_trainer(job).predict(module, job.data.loader(split))
    assert batches, "a split has at least one batch"
    logits, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    outputs = Outputs(logits.float().cpu(), labels.cpu())
    if not outputs.logits.isfinite().all():
        raise CheckpointError(f"{job.paths.best} gives outputs that are not finite; delete it to train again")
    tensors = {"logits": outputs.logits.contiguous(), "labels": outputs.labels}
    blob = safetensors.torch.save(tensors, metadata=_origin(job, split))
    write_atomically(job.paths.logits(split), lambda file: file.write(blob))
    return outputs


def _read(job: BranchJob, split: Split) -> Outputs | None:
    """The cached outputs, unless they are of other weights or damaged: then they are computed again."""
    origin = _origin(job, split)
    try:
        with safe_open(job.paths.logits(split), framework="pt") as file:
            if file.metadata() == origin:
                return Outputs(file.get_tensor("logits"), file.get_tensor("labels"))
    except (SafetensorError, OSError):
        return None
    return None


def _origin(job: BranchJob, split: Split) -> dict[str, str]:
    """What the logits were computed from: equal origin, equal logits."""
    return {"split": split, "checkpoint": fingerprint(job.paths.best), "settings": job.run.hash}
