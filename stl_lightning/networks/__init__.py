"""Branch networks and baselines: plain modules built from the shape of their input and the number of classes.

A network is a class whose first two parameters are `in_shape` (c, h, w) and `n_classes`; all others are
options with defaults, which a YAML file can state. Weights come from torch's global generator while the
object is built, and from nothing else: a caller that forks and seeds the generator decides them.

Letters: n samples, c channels, h w space, k classes.
"""

from stl_lightning.networks.branches import BranchNetworks, NetworkFactory, branch_seed
from stl_lightning.networks.common import Dropout
from stl_lightning.networks.convnet import ConvNet
from stl_lightning.networks.fastconvnet import FastConvNet
from stl_lightning.networks.mlp import MLP
from stl_lightning.networks.resnet import ResNet

__all__ = ["MLP", "BranchNetworks", "ConvNet", "Dropout", "FastConvNet", "NetworkFactory", "ResNet", "branch_seed"]
