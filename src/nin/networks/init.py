"""Starting weights, by name."""

from torch import nn


def initialize(network: nn.Module, init: str) -> None:
    """Draws the weights of every convolution and fully connected layer anew, in place.

    "xavier_uniform" (Glorot & Bengio 2010) is the notebooks': weights only, biases as torch draws them.
    "kaiming_normal" (He et al. 2015) fits ReLU; its biases start at zero. "kaiming_dirac" is the same, with two
    changes that let deep NiN learn on every seed: 1x1 convolutions that keep the number of channels start as the
    identity, and the last layer that is drawn starts small around 1, so that the ReLU on the classes' maps lets every
    class through for every image. "torch" leaves torch's own.

    Raises:
        ValueError: on another name.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    if init == "xavier_uniform":
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
    elif init in ("kaiming_normal", "kaiming_dirac"):
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if init == "kaiming_dirac":
            _start_as_identity(layers)
    elif init != "torch":
        raise ValueError(f"init={init!r}: must be xavier_uniform, kaiming_normal, kaiming_dirac or torch")


def _start_as_identity(layers: list[nn.Conv2d | nn.Linear]) -> None:
    keeping = [
        layer
        for layer in layers
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.in_channels == layer.out_channels
    ]
    for layer in keeping:
        nn.init.dirac_(layer.weight)
    last = [layer for layer in layers if layer not in keeping][-1]
    last.weight.data *= 0.3
    if last.bias is not None:
        nn.init.ones_(last.bias)
