"""The networks in plain PyTorch, each built from its name and its hyperparameters.

A module imports only from the modules below it:

    speed                     the same functions, computed faster
    nin, alexnet, lenet, vgg  the networks
    layers, init              table of layers; initialization of the weights
"""


from torch import nn

from nin.config.schema import Settings
from nin.networks.alexnet import AlexNet
from nin.networks.lenet import LeNet
from nin.networks.nin import NiN
from nin.networks.vgg import VGG

NETWORKS: dict[str, type[nn.Sequential]] = {"nin": NiN, "lenet": LeNet, "alexnet": AlexNet, "vgg": VGG}
IN_CHANNELS, NUM_CLASSES = 1, 10


def build(settings: Settings) -> nn.Sequential:
    """The network that ``settings.model`` names, for images of ``settings.data.image_size``."""
    hyperparameters = settings.model.model_dump(exclude={"name", "input_size"})
    return NETWORKS[settings.model.name](
        in_channels=IN_CHANNELS, num_classes=NUM_CLASSES, image_size=settings.data.image_size, **hyperparameters
    )
