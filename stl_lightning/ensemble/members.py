"""The outputs of trained branches: logits of one split, computed once and kept beside the weights they came from."""

import hashlib
import json
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stl_lightning.checkpoint import fingerprint
from stl_lightning.datamodule import Split
from stl_lightning.errors import RunError
from stl_lightning.paths import write_atomically
from stl_lightning.training import BranchJob, load_best


@dataclass(frozen=True)
class Outputs:
    """Logits (n k) of one branch and the labels (n,) of the same images."""

    logits: Tensor
    labels: Tensor


def branch_outputs(job: BranchJob, split: Split) -> Outputs:
    """The outputs of the best weights of a branch on one split, from the cache if it is of these weights.

    Raises: CheckpointError if the branch has no usable `best.ckpt`.
    """
    return _read(job, split) or compute_outputs(job, split)


def compute_outputs(job: BranchJob, split: Split) -> Outputs:
    """Run the branch over one split, with the device and precision of its training, and keep the outputs."""
    module = load_best(job)
    trainer = job.trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    batches = trainer.predict(module, job.data.loader(split))
    assert batches, "a split has at least one batch"
    logits, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    outputs = Outputs(logits.float().cpu(), labels.cpu())
    tensors = {"logits": outputs.logits.contiguous(), "labels": outputs.labels}
    blob = safetensors.torch.save(tensors, metadata=_origin(job, split))
    write_atomically(job.paths.logits(split), lambda file: file.write(blob))
    return outputs


def _read(job: BranchJob, split: Split) -> Outputs | None:
    path = job.paths.logits(split)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != _origin(job, split):
                return None
            return Outputs(file.get_tensor("logits"), file.get_tensor("labels"))
    except (SafetensorError, OSError) as error:
        raise RunError(f"cannot read {path}: {error}. Delete it to compute the logits again") from error


def _origin(job: BranchJob, split: Split) -> dict[str, str]:
    """What the logits were computed from: equal origin, equal logits."""
    settings = hashlib.sha256(json.dumps(job.run.settings, sort_keys=True).encode()).hexdigest()
    return {"split": split, "checkpoint": fingerprint(job.paths.best), "settings": settings}
