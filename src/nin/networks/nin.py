"""Network in Network (Lin et al. 2013), in the AlexNet-sized form of Dive into Deep Learning, section 8.3."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from nin.config.types import Fraction, NonNegative, Pixels, Width
from nin.networks.sequential import Network, build_fully_connected_head


class NiNBlock(Network):
    """A convolution followed by 1x1 convolutions: a small network slid over the image (Lin et al. 2013, section 3.1).

    Input: ``(batch, in_channels, height, width)``; output: ``(batch, widths[-1], height', width')``. Only the first
    convolution changes height and width.

    Args:
        widths: output channels of each convolution. One width is a plain convolution, three are the paper's block.
        kernel_size, stride, padding: of the first convolution, in pixels; the others are 1x1.
        norm: "batch" adds batch norm after every convolution, which then has no bias; "none".
        final_relu: whether the output passes a ReLU.
        conv1x1_relu: whether a ReLU follows each 1x1 convolution.
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
        conv1x1_relu: bool = True,
    ):
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            window = (kernel_size, stride, padding) if i == 0 else (1, 1, 0)
            # Batch norm has a bias of its own.
            layers.append(nn.Conv2d(in_channels, width, *window, bias=norm == "none"))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(width))
            if (i == 0 or conv1x1_relu) and (i < len(widths) - 1 or final_relu):
                layers.append(nn.ReLU(inplace=True))
            in_channels = width
        super().__init__(*layers)


class NiN(Network):
    """Blocks with 3x3 max pooling between them; the mean of each of the last block's maps is the logit of that class.

    With the default arguments it is the notebooks' network: the same layers and parameters in the same order as in
    their ``nn.Sequential``. Input: ``(batch, in_channels, image_size, image_size)``; output: logits
    ``(batch, num_classes)``. Softmax is part of the loss.

    Args:
        image_size: height and width of the input; used by ``head="fc"`` and ``head="mlp"`` only.
        widths: output channels of every block but the last; an entry may be a list with the width of each convolution.
        last_width: width of the last block's convolutions before the score maps; None is ``num_classes``.
        kernel_sizes: of each block's first convolution, including the last block's; all but the first are odd.
        first_stride: of the first convolution; the others have stride 1.
        first_padding: of the first convolution, 0 or 1 in the notebooks; the others preserve height and width.
        conv1x1_layers: number of 1x1 convolutions that follow each block's first convolution.
        conv1x1_relu: whether a ReLU follows each 1x1 convolution.
        head: "gap", the mean of each score map (section 3.2); "fc", a fully connected layer on the score maps; or
            "mlp", three fully connected layers as in AlexNet on the features before the last block, which it replaces.
        head_width: of the two hidden layers of ``head="mlp"``.
        dropout: probability of zeroing a value before the last block; with ``head="mlp"`` after each hidden layer.
        dropout_between: whether dropout is applied before every block but the first, as in the paper (section 4).
        norm: "batch" adds batch norm after every convolution; "none".
        final_relu: whether the score maps pass a ReLU, as in the notebooks.

    Raises:
        ValueError: if the arguments don't fit each other.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 224,
        widths: Annotated[Sequence[Width | Sequence[Width]], Field(min_length=1)] = (96, 256, 384),
        last_width: Width | None = None,
        kernel_sizes: Sequence[Pixels] = (11, 5, 3, 3),
        first_stride: Pixels = 4,
        first_padding: NonNegative = 0,
        conv1x1_layers: Annotated[int, Field(ge=0, le=100)] = 2,
        conv1x1_relu: bool = True,
        head: Literal["gap", "fc", "mlp"] = "gap",
        head_width: Width = 4096,
        dropout: Fraction = 0.5,
        dropout_between: bool = False,
        norm: Literal["none", "batch"] = "none",
        final_relu: bool = True,
    ):
        _require_fitting_blocks(widths, kernel_sizes, first_padding, conv1x1_layers)
        layers: list[nn.Module] = []
        size = image_size
        for i, (width, kernel) in enumerate(zip(widths, kernel_sizes[:-1], strict=True)):  # at 224x224:
            each = [width] * (1 + conv1x1_layers) if isinstance(width, int) else list(width)
            stride, padding = (first_stride, first_padding) if i == 0 else (1, kernel // 2)
            if dropout_between and i > 0:
                layers.append(nn.Dropout(dropout))
            layers.append(NiNBlock(in_channels, each, kernel, stride, padding, norm, conv1x1_relu=conv1x1_relu))
            size = (size + 2 * padding - kernel) // stride + 1  # (batch, 96, 54, 54), (batch, 256, 26, 26), ...
            layers.append(nn.MaxPool2d(3, stride=2))
            size = (size - 3) // 2 + 1  # (batch, 96, 26, 26), (batch, 256, 12, 12), (batch, 384, 5, 5)
            in_channels = each[-1]
        if head == "mlp":
            # From features (batch, 384, 5, 5): (batch, 9600), (batch, 4096), (batch, 4096), (batch, 10).
            layers += build_fully_connected_head(in_channels * size * size, head_width, num_classes, dropout)
        else:
            last = kernel_sizes[-1]
            each = [last_width or num_classes] * conv1x1_layers + [num_classes]
            layers.append(nn.Dropout(dropout))
            layers.append(NiNBlock(in_channels, each, last, 1, last // 2, norm, final_relu, conv1x1_relu))
            if head == "gap":  # from score maps (batch, 10, 5, 5)
                layers += [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()]  # (batch, 10, 1, 1), (batch, 10)
            else:
                layers += [nn.Flatten(), nn.Linear(num_classes * size * size, num_classes)]
        super().__init__(*layers)


def _require_fitting_blocks(
    widths: Sequence[int | Sequence[int]], kernel_sizes: Sequence[int], first_padding: int, conv1x1_layers: int
) -> None:
    if len(kernel_sizes) != len(widths) + 1:
        raise ValueError(
            f"kernel_sizes has {len(kernel_sizes)} entries and widths {len(widths)}: give one kernel size per block, "
            "that is one more than widths (the last block's width is the number of classes)"
        )
    if even := [kernel for kernel in kernel_sizes[1:] if kernel % 2 == 0]:
        raise ValueError(f"kernel_sizes={list(kernel_sizes)}: {even[0]} is even; all but the first must be odd")
    if first_padding >= kernel_sizes[0]:
        raise ValueError(
            f"first_padding={first_padding}: must be less than the first kernel size, {kernel_sizes[0]}, or the "
            "convolution has windows that hold nothing but padding"
        )
    layers = 1 + conv1x1_layers
    if other := [width for width in widths if not isinstance(width, int) and len(width) != layers]:
        raise ValueError(
            f"widths has {list(other[0])} for a block of {layers} layers (the convolution and conv1x1_layers="
            f"{conv1x1_layers}): give one width per layer, or one number for all"
        )
