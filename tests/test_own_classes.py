"""Networks and optimisers that a config names by their class or function, those of the user's own among them."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import DIGITS, Capture, stl

from stl_lightning.__main__ import main
from stl_lightning.cli.ensemble import load_ensemble
from stl_lightning.errors import ConfigError

OWN_NETWORK = """
import torch

class Tiny(torch.nn.Module):
    def __init__(self, in_shape, n_classes):
        super().__init__()
        c, h, w = in_shape
        self.layer = torch.nn.Linear(c * h * w, n_classes)

    def forward(self, x):
        return self.layer(x.flatten(1))

class Short(Tiny):
    def __init__(self, n_classes):
        super().__init__((1, 4, 4), n_classes)

class Wrong(Tiny):
    def __init__(self, in_shape, n_classes):
        super().__init__((1, 3, 3), n_classes)

class Few(Tiny):
    def __init__(self, in_shape, n_classes):
        super().__init__(in_shape, 2)
"""
OTHER_DEFAULTS = """
import torch

class Peppered(torch.nn.Module):
    def __init__(self, in_shape, n_classes, width=8, depth: int = 3, pepper: float = 0.5):
        super().__init__()
        raise TypeError("no pepper")
"""
NETWORKS = {
    "Tiny": (0, ""),
    "Short": (2, "network(in_shape, n_classes)"),
    "Wrong": (2, "expected logits (2, 10) for slices (2, 1, 4, 4)"),
    "Few": (2, "received (2, 2)"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_ones_own(name: str, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder the command is called in, with a sentence on the contract where it is not kept."""
    (tmp_path / "own_network.py").write_text(OWN_NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # for this test
    code, said = NETWORKS[name]
    assert stl("run", tmp_path, f"--model.network=own_network.{name}") == code
    err = capfd.readouterr().err
    assert said in err
    assert "Traceback" not in err
    if code == 0:
        sys.modules.pop("own_network")
        model = load_ensemble(tmp_path / "digits")
        assert not model(torch.zeros(3, 1, 8, 8)).requires_grad
        sys.modules.pop("own_network")
        monkeypatch.chdir("/")
        sys.path.remove(str(tmp_path))
        with pytest.raises(ConfigError, match="no module own_network in the folder that this is called from"):
            load_ensemble(tmp_path / "digits")


def test_a_class_has_its_own_defaults_and_not_those_of_the_default_class(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLP has a width and a depth too, Adam a weight decay of 0; only what a config says of another class stays."""
    (tmp_path / "own_defaults.py").write_text(OTHER_DEFAULTS)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "own.yaml"
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}}
    config.write_text(yaml.safe_dump({"model": {"network": "own_defaults.Peppered", "optimizer": adamw}}))

    def options(*args: str) -> tuple[dict[str, Any], dict[str, Any]]:
        with pytest.raises(SystemExit):
            main(["fit", *args, "--print_config"])
        model = yaml.safe_load(capfd.readouterr().out)["model"]
        return model["network"]["init_args"], model["optimizer"]["init_args"]

    asked = ["--model.network=own_defaults.Peppered", "--model.optimizer=torch.optim.AdamW"]
    for args in (["--config", str(config)], asked, ["--config", DIGITS, *asked]):
        network, optimizer = options(*args)
        written = {"width": 64} if DIGITS in args else {}
        assert network == {"width": 8, "depth": 3, "pepper": 0.5} | written
        assert optimizer["weight_decay"] == 0.01

    with pytest.raises(SystemExit):
        main(["fit", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.5", "--print_config=skip_default"])
    short = yaml.safe_load(capfd.readouterr().out)
    assert short["model"].keys() == {"optimizer"}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    _, optimizer = options("--config", str(tmp_path / "short.yaml"))
    assert (optimizer["lr"], optimizer["weight_decay"]) == (0.5, 0.01)

    assert main(["fit", "--config", str(config), "--trainer.max_epochs=1", f"--run.root={tmp_path}"]) == 2
    assert "here network((1, 4, 4), 10, width=8, depth=3, pepper=0.5); it answered: no pepper" in capfd.readouterr().err


FUNCTION = """
from torch import nn

def linear(in_shape, n_classes) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], n_classes))
"""


def test_a_network_may_be_a_function_and_a_config_a_pipe(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_function.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    settings = {"model": {"network": "own_function.linear"}, "trainer": {"max_epochs": 1, "accelerator": "cpu"}}
    reader, writer = os.pipe()
    os.write(writer, yaml.safe_dump(settings).encode())
    os.close(writer)
    assert main(["fit", f"--config=/dev/fd/{reader}", "--run.branches=[1]", "--run.root=runs"]) == 0
    os.close(reader)
    (tmp_path / "null.yaml").write_text("{model: {network: null}, trainer: {max_epochs: 1}}")
    assert main(["fit", "--config=null.yaml", "--run.root=other"]) == 2
    assert "model.network: expected a class" in capfd.readouterr().err


def test_a_module_that_nobody_has_imported_is_meant_too(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_package").mkdir()
    for name in ("__init__.py", "nets.py"):
        (tmp_path / "own_package" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert stl("fit", tmp_path, "--model.network=own_package.net.Tiny") == 2
    assert "did you mean nets in place of net?" in capfd.readouterr().err
