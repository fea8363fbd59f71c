"""The networks, plain torch, each built from its name and named hyperparameters."""

from typing import Any

from torch import nn

from nin.networks.alexnet import AlexNet
from nin.networks.lenet import LeNet
from nin.networks.nin import NiN
from nin.networks.vgg import VGG

NETWORKS: dict[str, type[nn.Sequential]] = {"nin": NiN, "lenet": LeNet, "alexnet": AlexNet, "vgg": VGG}


def build(name: str, **hyperparameters: Any) -> nn.Sequential:
    """The network called ``name``; the hyperparameters are its constructor's.

    Raises:
        KeyError: if there is no network of that name.
        TypeError: if it has no such hyperparameter.
    """
    return NETWORKS[name](**hyperparameters)
