"""What a branch is fed: its slices and no others, the same split and order on every rank, no test data in training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stl_lightning.augment import Augment
from stl_lightning.datamodule import SpectralDataModule, split_indices
from stl_lightning.errors import CheckpointError, ConfigError, DataError
from stl_lightning.loaders import ResumableLoader, epoch_order
from stl_lightning.slices import slices_of_branch
from stl_lightning.spectral import TRANSFORMS
from stl_lightning.store import prepare_store
from stl_lightning.training import steps_an_epoch


def module(**settings: Any) -> SpectralDataModule:
    return SpectralDataModule(**{"source": "digits", "val_size": 0.2, "branch": 0} | settings)


def everything(loader: ResumableLoader) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_branches_together_hold_the_image_and_nothing_else(transform: str) -> None:
    """Undo the standardisation and the transform of what B ranks were fed: the images they never saw come back."""
    data = module(transform=transform)
    slices = []
    for branch in range(data.n_branches):
        data.select_branches([branch])
        fed = data.slices_in("val")
        assert fed.batch(torch.arange(5), None)[0].shape[1:] == data.in_shape
        slices.append(everything(data.loader("val"))[0] * fed.statistics.std[0] + fed.statistics.mean[0])
    pixels = data.source.load("train").fetch(fed.indices)
    torch.testing.assert_close(data.spectral.inverse(slices) * 255, pixels.float(), atol=1e-2, rtol=0)


def test_training_slices_are_standardised() -> None:
    data = module(branch=3)
    x, _ = everything(data.train_dataloader())
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(1), atol=1e-3, rtol=0)


def test_a_constant_slice_stays_finite() -> None:
    """Digits have columns that are always black: a polyphase component of a large block never changes."""
    data = module(block=8, transform="identity")
    for branch in range(data.n_branches):
        data.select_branches([branch])
        assert everything(data.val_dataloader())[0].isfinite().all()


def test_splits_are_disjoint_cover_everything_and_depend_on_the_seed_alone() -> None:
    train, val = split_indices(1000, 0.1, seed=3)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(1000))
    assert len(val) == 100
    torch.rand(5)
    assert torch.equal(val, split_indices(1000, 100, seed=3)[1])
    assert not torch.equal(val, split_indices(1000, 100, seed=4)[1])


def test_all_branches_see_the_same_images_in_the_same_order() -> None:
    orders = []
    for branch in (0, 3):
        loader = module(branch=branch, batch_size=64).train_dataloader()
        loader.set_epoch(5)
        orders.append(everything(loader)[1])
    assert torch.equal(*orders)


def test_the_order_changes_with_the_epoch() -> None:
    assert not torch.equal(epoch_order(100, 0, 0), epoch_order(100, 0, 1))
    assert not torch.equal(epoch_order(100, 0, 1), epoch_order(100, 1, 0))
    assert sorted(epoch_order(100, 0, 0).tolist()) == list(range(100))


def test_augmentation_is_of_the_image_and_the_same_for_every_branch() -> None:
    """The slices that all branches were fed for one batch are those of one augmented image each."""
    augment = Augment(crop_pad=2, flip=True)
    data = module(augment=augment, seed=7)
    fed = []
    for branch in range(data.n_branches):
        data.select_branches([branch])
        part = data.slices_in("train", training=True)
        fed.append(part.batch(torch.arange(64), epoch=2)[0] * part.statistics.std[0] + part.statistics.mean[0])
    indices = part.indices[:64]
    images = data.source.load("train")
    pixels = images.fetch(indices, augment, seed=7, epoch=2)
    torch.testing.assert_close(data.spectral.inverse(fed) * 255, pixels.float(), atol=1e-2, rtol=0)
    assert not torch.equal(pixels, images.fetch(indices))


def test_validation_is_not_augmented() -> None:
    plain, augmented = module(), module(augment=Augment(crop_pad=2, flip=True))
    assert torch.equal(everything(plain.val_dataloader())[0], everything(augmented.val_dataloader())[0])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("first", [0, 1, 7, 12])
def test_a_loader_goes_on_where_its_state_says(first: int, num_workers: int) -> None:
    source = module().slices_in("train", training=True)

    def loader() -> ResumableLoader:
        made = ResumableLoader(source, 100, seed=1, num_workers=num_workers)
        made.set_epoch(4)
        return made

    interrupted = loader()
    seen = [batch for batch, _ in zip(interrupted, range(first), strict=False)]
    resumed = loader()
    resumed.load_state_dict({"epoch": 4, "batches": first, "chunk": None})
    rest = list(resumed)
    whole = list(loader())
    assert len(rest) == len(whole) - first
    for (x, y), (x_expected, y_expected) in zip([*seen, *rest], whole, strict=True):
        assert torch.equal(x, x_expected)
        assert torch.equal(y, y_expected)


@pytest.mark.parametrize("is_same_order", [False, True])
def test_overfitting_sees_the_same_batches_in_every_epoch(is_same_order: bool) -> None:
    loader = ResumableLoader(module().slices_in("train"), 100, seed=1, is_same_order=is_same_order)
    first = next(iter(loader))[0]
    loader.set_epoch(1)
    assert torch.equal(next(iter(loader))[0], first) == is_same_order


class Damaged:
    """One image of ten cannot be read."""

    def __len__(self) -> int:
        return 10

    def batch(self, positions: torch.Tensor, epoch: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        if 7 in positions:
            raise DataError("7.png cannot be read")
        return positions, positions


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_worker_cannot_read_is_said_as_it_is(num_workers: int) -> None:
    with pytest.raises(DataError, match=r"^7\.png cannot be read$"):
        list(ResumableLoader(Damaged(), 2, num_workers=num_workers))


def test_state_of_another_epoch_starts_from_the_beginning() -> None:
    loader = ResumableLoader(module().slices_in("train"), 100, seed=1)
    loader.load_state_dict({"epoch": 3, "batches": 9})
    loader.set_epoch(4)
    assert len(list(loader)) == len(loader)


def test_a_last_training_batch_of_one_is_left_out() -> None:
    source = module().slices_in("train")
    size = len(source) - 1
    assert [len(y) for _, y in ResumableLoader(source, size, seed=1)] == [size]
    assert steps_an_epoch({}, len(source), size) == 1
    assert [len(y) for _, y in ResumableLoader(source, size)] == [size, 1]


def test_slices_per_branch() -> None:
    assert slices_of_branch(0, 1, 4) == (0,)
    assert slices_of_branch(3, 2, 4) == (3, 0)
    assert slices_of_branch(0, 3, 4) == (0, 1, 2)
    data = module(slices_per_branch=2, branch=1, transform="dft", block=(1, 4))
    assert data.in_shape == (3, 8, 2)  # the DFT of 4 pixels: slices 0 and 2 are real, 1 is complex


def test_common_slices_are_read_by_every_branch_in_place_of_its_own() -> None:
    lowest = everything(module(branch=0).val_dataloader())
    for branch in range(4):
        data = module(common_slices=[0], branch=branch)
        assert data.branch == branch
        for received, expected in zip(everything(data.val_dataloader()), lowest, strict=True):
            assert torch.equal(received, expected)
    assert module(common_slices=[0]).agreement() != module().agreement()
    two = module(common_slices=[2, 0], branch=1)
    assert two.in_shape == (2, 4, 4)
    assert two.state_dict()["branches"][0]["slices"] == [2, 0]
    two.select_branches([1, 3])
    both, _ = two.slices_in("val").batch(torch.arange(5), None)
    assert torch.equal(both[0], both[1])


def test_slice_0_of_dct2_is_the_pixel_average() -> None:
    fed = module(common_slices=[0], branch=2).slices_in("val")
    pixels = module().source.load("train").fetch(fed.indices[:5])
    average = torch.nn.functional.avg_pool2d(pixels / 255, 2)
    raw, _ = replace(fed, statistics=None).batch(torch.arange(5), None)
    torch.testing.assert_close(raw, 2 * average)  # its filter has norm 1: four times 1/2 instead of 1/4


@pytest.mark.parametrize("stage", ["predict", "fit"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_mirrored_slices_are_those_of_the_mirror_images(transform: str, stage: str) -> None:
    """Also where the slices of the images are in memory already, standardised."""
    data = module(transform=transform)
    slices = []
    for branch in range(data.n_branches):
        data.select_branches([branch])
        data.setup(stage)
        fed = data.mirrored_slices_in("val")
        slices.append(everything(data.loader("val", mirrored=True))[0] * fed.statistics.std[0] + fed.statistics.mean[0])
    pixels = data.source.load("train").fetch(fed.indices)
    torch.testing.assert_close(data.spectral.inverse(slices) * 255, pixels.flip(-1).float(), atol=1e-2, rtol=0)


def stored(folder: Path, transform: str) -> str:
    data = module(transform=transform)
    prepare_store(folder, data.source, data.spectral, "float32", val_size=0.2, n_workers=1)
    return str(folder)


@pytest.mark.parametrize("reads", [{"slices_per_branch": 2}, {"common_slices": [3, 1]}])
def test_a_store_gives_what_the_images_give(reads: dict[str, Any], tmp_path: Path) -> None:
    kept = module(store=stored(tmp_path / "store", "dct2"), branch=2, **reads)
    kept.check([2])
    kept.check_mirror()
    for mirrored in (False, True):
        x, expected = (everything(data.loader("test", mirrored))[0] for data in (kept, module(branch=2, **reads)))
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


def test_stored_slices_that_do_not_determine_their_mirror_image_are_refused(tmp_path: Path) -> None:
    data = module(store=stored(tmp_path / "store", "random"), transform="random")
    for mirror in (data.check_mirror, lambda: data.loader("val", mirrored=True)):
        with pytest.raises(ConfigError, match=r"ensemble\.flips: expected false.*transforms can: dct2, hadamard"):
            mirror()
    module(transform="random").check_mirror()


def test_training_never_opens_the_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = module()
    read: list[str] = []
    load = type(data.source).load
    monkeypatch.setattr(type(data.source), "load", lambda self, split: read.append(split) or load(self, split))
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert set(read) == {"train"}
    list(data.test_dataloader())
    assert set(read) == {"train", "test"}


def test_a_checkpoint_of_other_slices_is_refused() -> None:
    data, other = module(branch=1), module(branch=2)
    data.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="branch 2, this is branch 1"):
        data.setup()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"val_size": 0}, "val_size"),
        ({"val_size": 5000}, "val_size"),
        ({"branch": 4}, "data.branch"),
        ({"common_slices": []}, r"data.common_slices: .*0 to 3.*got \[\]"),
        ({"common_slices": [4]}, r"data.common_slices: .*0 to 3.*got \[4\]"),
        ({"common_slices": [1, 1]}, r"data.common_slices: .*different.*got \[1, 1\]"),
        ({"common_slices": [0], "slices_per_branch": 2}, "data.slices_per_branch: expected 1 with data.common_slices"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        module(**settings).setup()


def test_files_are_decoded_in_workers_with_the_same_result(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for label in ("ant", "bee"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(6):
                pixels = torch.randint(
                    0, 256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)
                )
                Image.fromarray(pixels.numpy()).save(tmp_path / split / label / f"{i}.png")
    settings = {"source": "imagefolder", "root": str(tmp_path), "image_size": 16, "batch_size": 4}
    settings["augment"] = Augment(flip=True, resized_crop=(0.3, 1.0))
    alone, helped = (module(**settings, num_workers=n).train_dataloader() for n in (0, 2))
    for (x, y), (x_expected, y_expected) in zip(helped, alone, strict=True):
        assert torch.equal(x, x_expected)
        assert torch.equal(y, y_expected)


def test_branches_of_other_shapes_are_not_emitted_together() -> None:
    with pytest.raises(ConfigError, match=r"data\.branch: branches \[0, 1\] read \[1, 2\] channels"):
        module(transform="dft").select_branches([0, 1])


def test_stacked_branches_are_fed_what_each_is_fed_alone() -> None:
    data = module(augment=Augment(crop_pad=2, aligned=True, flip=True, mixup=0.4))
    data.select_branches([1, 3])
    data.setup("fit")
    together, targets = data.slices_in("train", training=True).batch(torch.arange(32), epoch=1)
    for i, branch in enumerate((1, 3)):
        data.select_branches([branch])
        data.setup("fit")
        alone, own_targets = data.slices_in("train", training=True).batch(torch.arange(32), epoch=1)
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-5)
        assert torch.equal(targets, own_targets)
