"""Network in Network (Lin et al. 2013), in the AlexNet-sized form of Dive into Deep Learning, section 8.3."""

from collections.abc import Sequence

from torch import nn

from nin.networks.init import initialize


class NiNBlock(nn.Sequential):
    """A convolution followed by 1x1 convolutions: a small network slid over the image (Lin et al. 2013, section 3.1).

    ``widths`` are the channels behind each of them: one is a plain convolution, three are the paper's block.
    ``(batch, in_channels, height, width)`` becomes ``(batch, widths[-1], height', width')``; only the first
    convolution changes height and width.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        kernel_size: int,
        stride: int,
        padding: int,
        norm: str = "none",
        final_relu: bool = True,
    ):
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            window = (kernel_size, stride, padding) if i == 0 else (1, 1, 0)
            # Batch norm has a bias of its own.
            layers.append(nn.Conv2d(in_channels, width, *window, bias=norm == "none"))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(width))
            if final_relu or i < len(widths) - 1:
                layers.append(nn.ReLU(inplace=True))
            in_channels = width
        super().__init__(*layers)


class NiN(nn.Sequential):
    """Blocks with 3x3 max pooling between them; the last block has one map a class, and its mean is the logit.

    At its defaults it is the notebooks' network, parameter by parameter, in the order of their ``nn.Sequential``.
    Input: ``(batch, in_channels, image_size, image_size)``; output: logits ``(batch, num_classes)``. Softmax is in
    the loss.

    Args:
        widths: channels of every block but the last; a block may list those of each of its layers.
        last_width: channels of the last block's layers in front of the classes' maps; None is ``num_classes``.
        kernel_sizes: of each block's first convolution, the last block's too; all but the first are odd.
        first_padding: of the first convolution, 0 or 1 in the notebooks; the others keep their input's size.
        conv1x1_layers: 1x1 convolutions in each block behind the first one.
        head: "gap", the mean of each class's map (section 3.2), or "fc", a fully connected layer on the maps.
        dropout: share of values that are dropped before the last block.
        dropout_between: whether they are dropped before every block but the first, as in the paper (section 4).
        final_relu: whether the classes' maps end in a ReLU, as in the notebooks.
        image_size: pixels a side; only ``head="fc"`` needs it.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 224,
        widths: Sequence[int | Sequence[int]] = (96, 256, 384),
        last_width: int | None = None,
        kernel_sizes: Sequence[int] = (11, 5, 3, 3),
        first_stride: int = 4,
        first_padding: int = 0,
        conv1x1_layers: int = 2,
        head: str = "gap",
        dropout: float = 0.5,
        dropout_between: bool = False,
        norm: str = "none",
        init: str = "xavier_uniform",
        final_relu: bool = True,
    ):
        layers: list[nn.Module] = []
        size = image_size
        for i, (width, kernel) in enumerate(zip(widths, kernel_sizes[:-1], strict=True)):  # at 224x224:
            each = [width] * (1 + conv1x1_layers) if isinstance(width, int) else list(width)
            stride, padding = (first_stride, first_padding) if i == 0 else (1, kernel // 2)
            layers.append(NiNBlock(in_channels, each, kernel, stride, padding, norm))
            size = (size + 2 * padding - kernel) // stride + 1  # (batch, 96, 54, 54), (batch, 256, 26, 26), ...
            layers.append(nn.MaxPool2d(3, stride=2))
            size = (size - 3) // 2 + 1  # (batch, 96, 26, 26), (batch, 256, 12, 12), (batch, 384, 5, 5)
            if dropout_between or i == len(widths) - 1:
                layers.append(nn.Dropout(dropout))
            in_channels = each[-1]
        last = kernel_sizes[-1]
        each = [last_width or num_classes] * conv1x1_layers + [num_classes]
        layers.append(NiNBlock(in_channels, each, last, 1, last // 2, norm, final_relu))  # (batch, 10, 5, 5)
        if head == "gap":
            layers += [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()]  # (batch, 10, 1, 1), (batch, 10)
        else:
            layers += [nn.Flatten(), nn.Linear(num_classes * size * size, num_classes)]
        super().__init__(*layers)
        initialize(self, init)
