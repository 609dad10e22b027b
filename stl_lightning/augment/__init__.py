"""Augmentation that all ranks repeat alone: crop, flip and erase of images or of slices, mixup and cutmix of slices."""

from stl_lightning.augment.boxes import box_draws, resized_crop_box
from stl_lightning.augment.draws import uniform
from stl_lightning.augment.mix import mix
from stl_lightning.augment.pixels import Augment
from stl_lightning.augment.slices import SliceAugment, SliceMirror, can_augment_slices, check_augment

__all__ = [
    "Augment",
    "SliceAugment",
    "SliceMirror",
    "box_draws",
    "can_augment_slices",
    "check_augment",
    "mix",
    "resized_crop_box",
    "uniform",
]
