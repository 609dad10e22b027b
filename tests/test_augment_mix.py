"""Mixup and cutmix: shares add up, targets say what is in the image, and slices are mixed as images would be."""

import numpy as np
import pytest
import torch
from scipy.stats import beta as reference
from scipy.stats import kstest
from torch import Tensor

from stl_lightning.augment import Augment, mix
from stl_lightning.augment.boxes import cut_boxes
from stl_lightning.augment.mix import beta, partners
from stl_lightning.spectral import TRANSFORMS, SpectralSplit, fitting_transforms

SEED, EPOCH, N, K = 3, 5, 50, 7
INDICES = torch.arange(200, 200 + N)
LABELS = torch.arange(N) % K
MIXES = {
    "mixup": Augment(mixup=0.4),
    "cutmix": Augment(cutmix=1.0),
    "both": Augment(mixup=0.4, cutmix=1.0),
}


def run(augment: Augment, x: Tensor, batch_size: int = N, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    chosen = torch.arange(len(x[0])) if chosen is None else chosen
    return mix(augment, x[:, chosen], LABELS[chosen], K, SEED, EPOCH, INDICES[chosen], batch_size)


def contents(augment: Augment, batch_size: int = N) -> tuple[Tensor, Tensor]:
    """How much of sample j is at each place of sample i (i j h w): samples whose only channel of ones is their own."""
    mixed, targets = run(augment, torch.eye(N)[None, :, :, None, None].expand(1, N, N, 6, 8), batch_size)
    return mixed[0], targets


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("batch_size", [N, 16, 2])
def test_targets_say_how_much_of_which_class_is_in_the_sample(name, batch_size):
    shares, targets = contents(MIXES[name], batch_size)
    torch.testing.assert_close(shares.sum(1), torch.ones(N, 6, 8))
    torch.testing.assert_close(targets.sum(1), torch.ones(N))
    of_classes = torch.zeros(N, K).index_add_(1, LABELS, shares.mean((2, 3)))
    torch.testing.assert_close(targets, of_classes, atol=1e-6, rtol=1e-5)
    involved = shares.amax((2, 3)) > 0
    batch = torch.arange(N) // batch_size
    assert (involved.sum(1) <= 2).all()
    assert torch.equal(batch[:, None].expand(N, N)[involved], batch.expand(N, N)[involved])  # of one minibatch
    assert (involved.sum(1) == 2).float().mean() > 0.8


def test_mixup_is_the_same_everywhere_and_cutmix_cuts_one_box():
    shares = contents(MIXES["mixup"])[0]
    assert torch.equal(shares, shares[..., :1, :1].expand_as(shares))
    own = contents(MIXES["cutmix"])[0].diagonal().permute(2, 0, 1)  # n h w
    assert set(own.unique().tolist()) == {0, 1}
    away = own == 0
    assert torch.equal(away, away.any(2, keepdim=True) & away.any(1, keepdim=True))
    assert away.any(1).diff(dim=1).sum(1).max() <= 2
    assert away.any(2).diff(dim=1).sum(1).max() <= 2
    own = contents(MIXES["both"])[0].diagonal().permute(2, 0, 1)
    is_mixup = ((own > 0) & (own < 1)).flatten(1).any(1)
    assert 10 < int(is_mixup.sum()) < 40


@pytest.mark.parametrize("name", MIXES)
def test_a_minibatch_is_mixed_alone_and_its_order_does_not_matter(name):
    x = torch.randn(3, N, 2, 4, 5)
    whole, targets = run(MIXES[name], x, 16)
    for batch in torch.arange(N).split(16):
        order = batch[torch.randperm(len(batch))]
        part, part_targets = run(MIXES[name], x, 16, order)
        assert torch.equal(part, whole[:, order])
        assert torch.equal(part_targets, targets[order])


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_mixing_slices_is_mixing_images(name, transform):
    block = (2, 4)
    assert transform in fitting_transforms(block)
    split = SpectralSplit((3, 12, 32), block, transform=transform).fit(torch.rand(30, 3, 12, 32))
    images = torch.rand(N, 3, 12, 32)
    places = contents(MIXES[name])[0].repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)  # n m H W
    expected = split(torch.einsum("nmhw,mchw->nchw", places, images))
    for part, wanted in zip(split(images), expected, strict=True):
        torch.testing.assert_close(run(MIXES[name], part[None])[0][0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MIXES)
def test_mixing_commutes_with_standardising(name):
    x, mean, std = torch.randn(2, N, 3, 4, 4), torch.randn(2, 1, 3, 1, 1), torch.rand(2, 1, 3, 1, 1) + 0.5
    before, after = run(MIXES[name], (x - mean) / std)[0], (run(MIXES[name], x)[0] - mean) / std
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


def test_without_mixing_only_the_labels_change_their_form():
    x = torch.randn(2, N, 1, 3, 3)
    same, targets = run(Augment(crop_pad=2, flip=True), x)
    assert torch.equal(same, x)
    assert torch.equal(targets, torch.eye(K)[LABELS])


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (8, 8), (50, 16), (33, 16), (5, 100)])
def test_partners_form_one_ring_in_each_minibatch(n, batch_size):
    partner = partners(np.random.default_rng(0).random(n), batch_size)
    for batch in np.split(np.arange(n), range(batch_size, n, batch_size)):
        ring = [batch[0]]
        while partner[ring[-1]] != batch[0]:
            ring.append(partner[ring[-1]])
            assert len(ring) <= len(batch)
        assert sorted(ring) == list(batch)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha):
    u = np.random.default_rng(0).random(20_000)
    assert kstest(beta(u, alpha), reference(alpha, alpha).cdf).pvalue > 1e-3
    assert np.abs(beta(u, alpha) - reference.ppf(u, alpha, alpha)).mean() < 1e-4


def test_a_cut_box_around_the_centre_has_the_area_asked_for():
    area = np.linspace(0, 1, 11)
    boxes = cut_boxes(np.full((11, 2), 0.5), area, 400, 600)
    np.testing.assert_allclose(boxes[:, 2] * boxes[:, 3] / 240_000, area, atol=0.01)
    np.testing.assert_allclose(boxes[:, 2] / 400, boxes[:, 3] / 600, atol=0.01)
    np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:] / 2, np.tile([200, 300], (11, 1)), atol=0.5)


def test_a_cut_box_is_clipped_at_the_edge():
    boxes = cut_boxes(np.array([[0.0, 0.0], [0.999, 0.999]]), np.full(2, 0.25), 8, 8)
    assert boxes.tolist() == [[0, 0, 2, 2], [6, 6, 2, 2]]
