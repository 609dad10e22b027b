"""Every network at every shape it is meant for; published sizes; torchvision's ResNet as reference."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torchvision
from jsonargparse import ArgumentParser
from torch import nn

from stl_lightning.errors import ConfigError
from stl_lightning.networks import MLP, ConvNet, FastConvNet, ResNet

# A row is (class, options, input shape).
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, int, int]]] = {
    "mlp-slice": (MLP, {}, (1, 7, 7)),
    "mlp-linear": (MLP, {"depth": 1}, (1, 4, 4)),
    "mlp-norm": (MLP, {"depth": 3, "width": 20, "batch_norm": True, "dropout": 0.1}, (2, 4, 4)),
    "conv-ten": (ConvNet, {}, (3, 16, 16)),
    "conv-small": (ConvNet, {"widths": [8, "P", 8, "P"], "dropout": 0.1}, (6, 7, 7)),
    "conv-one-pixel": (ConvNet, {"widths": [4, "P", "P", "P"]}, (1, 8, 8)),
    "fast-slice": (FastConvNet, {"widths": [8, 12, 16]}, (6, 16, 16)),
    "fast-odd": (FastConvNet, {"widths": [4, 4, 4], "dropout": 0.1}, (1, 7, 5)),
    "resnet-slice": (ResNet, {"width": 8}, (3, 8, 8)),
    "resnet-odd": (ResNet, {"width": 8}, (1, 7, 5)),
    "resnet-stages": (ResNet, {"depth": [1, 2], "width": 8, "dropout": 0.1}, (3, 9, 9)),
    "resnet-image": (ResNet, {"depth": [1, 1], "width": 8, "stem": "image"}, (3, 32, 32)),
}
N_CLASSES = 5
TEN = [64, 64, 64, "P", 128, 128, 128, "P", 256, 256, 256, 256]
TWELVE = [64, 64, "P", 128, 128, "P", 256, 256, 256, 256, "P", 512, 512, 512, 512]


@pytest.fixture(params=NETWORKS)
def row(request):
    return NETWORKS[request.param]


def build(row, seed: int = 0) -> nn.Module:
    kind, options, in_shape = row
    torch.manual_seed(seed)
    return kind(in_shape, N_CLASSES, **options)


def batch(row, n: int = 6) -> torch.Tensor:
    return torch.randn(n, *row[2], generator=torch.Generator().manual_seed(1))


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_logits_have_one_row_per_sample(row):
    assert build(row)(batch(row)).shape == (6, N_CLASSES)


def test_one_sample_in_eval_is_as_in_a_batch(row):
    network = build(row).eval()
    torch.testing.assert_close(network(batch(row)[:1]), network(batch(row))[:1])


def test_weights_depend_on_the_global_seed_alone(row):
    weights = [torch.cat([p.flatten() for p in build(row, seed).parameters()]) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_gradients_reach_every_parameter(row):
    network = build(row)
    network(batch(row)).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_channels_last_gives_the_same_logits(row):
    network = build(row).eval()
    expected = network(batch(row))
    result = network.to(memory_format=torch.channels_last)(batch(row).to(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast_gives_nearly_the_same_logits_and_finite_gradients(row):
    network = build(row).eval()
    expected = network(batch(row))
    with torch.autocast("cpu", torch.bfloat16):
        result = network(batch(row))
    result.float().square().mean().backward()
    assert (result - expected).norm() < 0.05 * expected.norm()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_state_loads_into_another_object(row):
    source, target = build(row, seed=0).eval(), build(row, seed=1).eval()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(batch(row)), source(batch(row)))


def test_activations_keep_their_size_through_a_deep_mlp():
    torch.manual_seed(0)
    logits = MLP((1, 28, 28), 10)(torch.randn(256, 1, 28, 28))
    assert 0.5 < logits.std() / 2**0.5 < 2  # sqrt 2: the last layer has no ReLU to halve the mean square


def convolutions(widths: list, n_in: int, n_classes: int) -> int:
    channels = [n_in, *(w for w in widths if w != "P")]
    layers = sum(9 * a * b + 2 * b for a, b in pairwise(channels))
    return layers + (channels[-1] + 1) * n_classes


def with_slice_stem(name: str) -> int:
    """The size of torchvision's network, its 7x7 stem replaced by a 3x3 one."""
    return size(getattr(torchvision.models, name)()) - 3 * 64 * (7 * 7 - 3 * 3)


# class, options, input, classes, parameters; the two MLPs take .07 MB and 16.5 MB in four-byte numbers
PUBLISHED = {
    "mnist-branch": (MLP, {}, (1, 7, 7), 10, 17_650),
    "mnist-baseline": (MLP, {}, (1, 28, 28), 10, 4_315_930),
    "cifar-branch": (ConvNet, {}, (3, 16, 16), 10, convolutions(TEN, 3, 10)),
    "cifar-baseline": (ConvNet, {"widths": [*TEN, "P"]}, (3, 32, 32), 10, convolutions(TEN, 3, 10)),
    "imagenet-branch": (ConvNet, {"widths": TWELVE}, (3, 56, 56), 1000, convolutions(TWELVE, 3, 1000)),
    "imagenet-baseline": (
        ConvNet,
        {"widths": [64, "P", *TWELVE[1:], "P"]},
        (3, 224, 224),
        1000,
        convolutions(TWELVE, 3, 1000),
    ),
    "resnet18-branch": (ResNet, {}, (3, 56, 56), 1000, with_slice_stem("resnet18")),
    "resnet34-branch": (ResNet, {"depth": 34}, (3, 56, 56), 1000, with_slice_stem("resnet34")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_published_size(name):
    kind, options, in_shape, n_classes, expected = PUBLISHED[name]
    with torch.device("meta"):
        network = kind(in_shape, n_classes, **options)
        assert network(torch.empty(2, *in_shape)).shape == (2, n_classes)
    assert size(network) == expected


@pytest.mark.parametrize("depth", [18, 34])
def test_resnet_with_the_image_stem_is_that_of_torchvision(depth):
    with torch.device("meta"):
        ours = ResNet((3, 224, 224), 10, depth=depth, stem="image")
        theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=10)
    ours, theirs = ours.to_empty(device="cpu").eval(), theirs.to_empty(device="cpu").eval()
    state = theirs.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.05 + ("running_var" in name))
    own_names = list(ours.state_dict())
    ours.load_state_dict(dict(zip(own_names, state.values(), strict=True)))
    x = torch.randn(1, 3, 64, 64, generator=generator)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("kind", "in_shape", "options", "setting", "received"),
    [
        (MLP, (1, 7, 7), {"depth": 0}, "depth", "0"),
        (MLP, (1, 7, 7), {"width": 0}, "width", "0"),
        (MLP, (1, 7, 7), {"dropout": 1.0}, "dropout", "1.0"),
        (ConvNet, (3, 7, 9), {"widths": [8, "P", "P", "P"]}, "widths", "7x9"),
        (ConvNet, (3, 8, 8), {"widths": ["P"]}, "widths", "P"),
        (ConvNet, (3, 8, 8), {"widths": [8, "Q"]}, "widths", "Q"),
        (ConvNet, (3, 8, 8), {"widths": [0]}, "widths", "0"),
        (ConvNet, (3, 8, 8), {"dropout": -0.1}, "dropout", "-0.1"),
        (FastConvNet, (3, 7, 9), {"widths": [8, 8, 8, 8]}, "widths", "7x9"),
        (FastConvNet, (3, 8, 8), {"widths": []}, "widths", r"\[\]"),
        (FastConvNet, (3, 8, 8), {"widths": [8, 0]}, "widths", "0"),
        (FastConvNet, (3, 8, 8), {"dropout": 1.0}, "dropout", "1.0"),
        (ResNet, (3, 8, 8), {"depth": 19}, "depth", "19"),
        (ResNet, (3, 8, 8), {"depth": []}, "depth", r"\[\]"),
        (ResNet, (3, 8, 8), {"depth": [2, 0]}, "depth", "2, 0"),
        (ResNet, (3, 4, 4), {}, "depth", "4x4"),
        (ResNet, (3, 1, 1), {"stem": "image"}, "depth", "1x1"),
        (ResNet, (3, 8, 8), {"stem": "other"}, "stem", "other"),
        (ResNet, (3, 8, 8), {"width": 0}, "width", "0"),
        (ResNet, (3, 8, 8), {"dropout": 2.0}, "dropout", "2.0"),
    ],
)
def test_an_unusable_option_is_refused_by_name(kind, in_shape, options, setting, received):
    with pytest.raises(ConfigError, match=rf"model\.network\.init_args\.{setting}: .*{received}"):
        kind(in_shape, N_CLASSES, **options)


def test_options_come_from_yaml(row):
    """As the command line does it: the file names class and options, the shapes are given later."""
    kind, options, in_shape = row
    parser = ArgumentParser()
    parser.add_subclass_arguments(kind, "network", skip={"in_shape", "n_classes"}, instantiate=False)
    written = {"class_path": f"stl_lightning.networks.{kind.__name__}", "init_args": options}
    text = parser.dump(parser.parse_object({"network": written}), format="yaml")
    parsed = parser.parse_string(text).network.init_args.as_dict()
    assert size(kind(in_shape, N_CLASSES, **parsed)) == size(build(row))
