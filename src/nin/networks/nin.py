"""Network in Network (Lin et al. 2013), in the AlexNet-sized form of Dive into Deep Learning, section 8.3."""

from collections.abc import Sequence

from torch import nn

from nin.networks.init import initialise


class NiNBlock(nn.Sequential):
    """A convolution followed by 1x1 convolutions: a small network slid over the image (Lin et al. 2013, section 3.1).

    ``conv1x1_layers=0`` is a plain convolution, ``2`` is the paper's block. ``(batch, in_channels, height, width)``
    becomes ``(batch, out_channels, height', width')``; only the first convolution changes height and width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        conv1x1_layers: int = 2,
        norm: str = "none",
        final_relu: bool = True,
    ):
        layers: list[nn.Module] = []
        for i in range(1 + conv1x1_layers):
            # Batch norm has a bias of its own.
            window = (kernel_size, stride, padding) if i == 0 else (1, 1, 0)
            layers.append(
                nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, *window, bias=norm == "none")
            )
            if norm == "batch":
                layers.append(nn.BatchNorm2d(out_channels))
            if final_relu or i < conv1x1_layers:
                layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class NiN(nn.Sequential):
    """Blocks with 3x3 max pooling between them; the last block has one map a class, and its mean is the logit.

    At its defaults it is the notebooks' network, parameter by parameter, in the order of their ``nn.Sequential``.
    Input: ``(batch, in_channels, image_size, image_size)``; output: logits ``(batch, num_classes)``. Softmax is in
    the loss.

    Args:
        widths: channels of every block but the last, whose width is ``num_classes``.
        kernel_sizes: of each block's first convolution, the last block's too; all but the first are odd.
        first_padding: of the first convolution, 0 or 1 in the notebooks; the others keep their input's size.
        conv1x1_layers: 1x1 convolutions in each block behind the first one.
        head: "gap", the mean of each class's map (section 3.2), or "fc", a fully connected layer on the maps.
        dropout: share of values that are dropped before the last block.
        final_relu: whether the classes' maps end in a ReLU, as in the notebooks.
        image_size: pixels a side; only ``head="fc"`` needs it.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 224,
        widths: Sequence[int] = (96, 256, 384),
        kernel_sizes: Sequence[int] = (11, 5, 3, 3),
        first_stride: int = 4,
        first_padding: int = 0,
        conv1x1_layers: int = 2,
        head: str = "gap",
        dropout: float = 0.5,
        norm: str = "none",
        init: str = "xavier_uniform",
        final_relu: bool = True,
    ):
        layers: list[nn.Module] = []
        size = image_size
        for i, (width, kernel) in enumerate(zip(widths, kernel_sizes[:-1], strict=True)):  # at 224x224:
            stride, padding = (first_stride, first_padding) if i == 0 else (1, kernel // 2)
            layers.append(NiNBlock(in_channels, width, kernel, stride, padding, conv1x1_layers, norm))
            size = (size + 2 * padding - kernel) // stride + 1  # (batch, 96, 54, 54), (batch, 256, 26, 26), ...
            layers.append(nn.MaxPool2d(3, stride=2))
            size = (size - 3) // 2 + 1  # (batch, 96, 26, 26), (batch, 256, 12, 12), (batch, 384, 5, 5)
            in_channels = width
        layers.append(nn.Dropout(dropout))
        last = kernel_sizes[-1]
        # (batch, 10, 5, 5)
        layers.append(NiNBlock(in_channels, num_classes, last, 1, last // 2, conv1x1_layers, norm, final_relu))
        if head == "gap":
            layers += [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()]  # (batch, 10, 1, 1), (batch, 10)
        else:
            layers += [nn.Flatten(), nn.Linear(num_classes * size * size, num_classes)]
        super().__init__(*layers)
        initialise(self, init)
