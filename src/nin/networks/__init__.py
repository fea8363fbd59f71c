"""The networks, plain torch, each built from its name and named hyperparameters."""

from torch import nn

from nin.config.schema import Settings
from nin.networks.alexnet import AlexNet
from nin.networks.lenet import LeNet
from nin.networks.nin import NiN
from nin.networks.vgg import VGG

NETWORKS: dict[str, type[nn.Sequential]] = {"nin": NiN, "lenet": LeNet, "alexnet": AlexNet, "vgg": VGG}
IN_CHANNELS, NUM_CLASSES = 1, 10


def build(settings: Settings, in_channels: int = IN_CHANNELS, num_classes: int = NUM_CLASSES) -> nn.Sequential:
    """The network that ``settings.model`` names, for images of ``settings.data.image_size``."""
    hyperparameters = settings.model.model_dump(exclude={"name", "input_size"})
    return NETWORKS[settings.model.name](
        in_channels=in_channels, num_classes=num_classes, image_size=settings.data.image_size, **hyperparameters
    )
