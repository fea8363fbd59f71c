"""The networks, in plain torch, each built from its name and named hyperparameters."""

from collections.abc import Callable

from torch import nn

from nin.config.schema import Settings
from nin.networks.alexnet import AlexNet
from nin.networks.lenet import LeNet
from nin.networks.mlp import MLP
from nin.networks.nin import NiN
from nin.networks.vgg import VGG

NETWORKS: dict[str, Callable[..., nn.Sequential]] = {
    "nin": NiN,
    "lenet": LeNet,
    "alexnet": AlexNet,
    "vgg": VGG,
    "mlp": MLP,
}


def build(settings: Settings, in_channels: int, num_classes: int) -> nn.Sequential:
    """Builds the network that ``settings.model`` names, for images of ``settings.data.image_size``.

    Args:
        in_channels: number of channels in the input images.
        num_classes: number of logits in the output.
    """
    hyperparameters = settings.model.model_dump(exclude={"name", "input_size"})
    return NETWORKS[settings.model.name](
        in_channels=in_channels, num_classes=num_classes, image_size=settings.data.image_size, **hyperparameters
    )
