"""`stl validate`, `stl test` and `stl predict`: what the trained branches of this rank say of a split."""

import json

from stl_lightning.cli.config import SpectralCLI
from stl_lightning.datamodule import Split
from stl_lightning.ensemble.members import compute_outputs, scores
from stl_lightning.run import check_same_settings, open_run
from stl_lightning.training import check_same_config


def validate(args: list[str]) -> int:
    """Score the branches of this rank on the validation split."""
    cli = SpectralCLI(args, "validate", "Score the branches of this rank on the validation split.")
    return _score(cli, "val")


def test(args: list[str]) -> int:
    """Score the branches of this rank on the test set."""
    cli = SpectralCLI(args, "test", "Score the branches of this rank on the test set.")
    return _score(cli, "test")


def predict(args: list[str]) -> int:
    """Write the logits of the branches of this rank for the images of `data.predict_split`."""
    cli = SpectralCLI(args, "predict", "Write the logits of the branches of this rank for data.predict_split.")
    return _score(cli, cli.config.data.predict_split)


def _score(cli: SpectralCLI, split: Split) -> int:
    """Compute the logits of each branch of this rank, keep them where `stl ensemble` finds them, print the scores."""
    run = open_run(cli.options.paths)
    check_same_settings(
        run.paths, run.settings, cli.data.agreement(), "Expected the config of the run (`branches/NN/config.yaml`)"
    )
    for branch in cli.owned_branches():
        job = cli.job(run, branch)
        check_same_config(job)
        outputs = compute_outputs(job, split, cli.ensemble_options.flips)
        line = {"branch": branch, "split": split} | scores(outputs)
        print(json.dumps(line | {"logits": str(job.paths.logits(split))}), flush=True)
    return 0
