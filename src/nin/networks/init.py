"""Starting weights, by name."""

from torch import nn


def initialise(network: nn.Module, init: str) -> None:
    """Draws the weights of every convolution and fully connected layer anew, in place.

    "xavier_uniform" (Glorot & Bengio 2010) is the notebooks': weights only, biases as torch draws them.
    "kaiming_normal" (He et al. 2015) fits ReLU; its biases start at zero. "torch" leaves torch's own.

    Raises:
        ValueError: on another name.
    """
    for layer in network.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear) or init == "torch":
            continue
        if init == "xavier_uniform":
            nn.init.xavier_uniform_(layer.weight)
        elif init == "kaiming_normal":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        else:
            raise ValueError(f"init={init!r}: must be xavier_uniform, kaiming_normal or torch")
