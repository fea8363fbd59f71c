"""The typed config of each network, and the smallest image size that it accepts. Imports no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A section of the config. Strict: ``"1"`` and ``true`` are not accepted for 1, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
# Of a kernel, stride or image, in pixels. More than any image has would only take time and memory to refuse.
Pixels = Annotated[int, Field(ge=1, le=1024)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Init = Literal["xavier_uniform", "kaiming_normal", "kaiming_dirac", "torch"]


class NiN(Section):
    """Network in Network (Lin et al. 2013) as the notebooks build it; ``nin_small`` is the same at 28x28."""

    name: Literal["nin"]
    input_size: Positive
    # One entry per block: the number of output channels of all its layers, or a list with each layer's number.
    widths: Annotated[list[Width | list[Width]], Field(min_length=1)]
    last_width: Width | None
    kernel_sizes: list[Pixels]
    first_stride: Pixels
    first_padding: Annotated[int, Field(ge=0)]
    conv1x1_layers: Annotated[int, Field(ge=0, le=100)]
    conv1x1_relu: bool
    head: Literal["gap", "fc", "mlp"]
    head_width: Width
    dropout: Share
    dropout_between: bool
    norm: Literal["none", "batch"]
    init: Init
    final_relu: bool

    @model_validator(mode="after")
    def validate_kernel_sizes(self):
        if len(self.kernel_sizes) != len(self.widths) + 1:
            raise ValueError(
                f"kernel_sizes has {len(self.kernel_sizes)} entries and widths {len(self.widths)}: "
                "give one kernel size per block, that is one more than widths (the last block's width is the number of "
                "classes)"
            )
        if even := [k for k in self.kernel_sizes[1:] if k % 2 == 0]:
            raise ValueError(f"kernel_sizes={self.kernel_sizes}: {even[0]} is even; all but the first must be odd")
        if self.first_padding >= self.kernel_sizes[0]:
            raise ValueError(
                f"first_padding={self.first_padding}: must be less than the first kernel size, {self.kernel_sizes[0]}, "
                "or the convolution has windows that hold nothing but padding"
            )
        return self

    @model_validator(mode="after")
    def validate_widths(self):
        layers = 1 + self.conv1x1_layers
        if other := [w for w in self.widths if isinstance(w, list) and len(w) != layers]:
            raise ValueError(
                f"widths has {other[0]} for a block of {layers} layers (the convolution and conv1x1_layers="
                f"{self.conv1x1_layers}): give one width per layer, or one number for all"
            )
        return self

    def windows(self) -> list[tuple[int, int, int]]:
        """Kernel size, stride and padding of every layer that reduces height and width, in order."""
        windows = []
        for i, kernel in enumerate(self.kernel_sizes):
            windows += [(3, 2, 0)] if i else []
            windows += [(kernel, 1, kernel // 2) if i else (kernel, self.first_stride, self.first_padding)]
        return windows


class LeNet(Section):
    """LeNet-5 as the notebooks' book defines it (Dive into Deep Learning, section 7.6)."""

    name: Literal["lenet"]
    input_size: Positive
    init: Init

    def windows(self) -> list[tuple[int, int, int]]:
        return [(5, 1, 2), (2, 2, 0), (5, 1, 0), (2, 2, 0)]


class AlexNet(Section):
    """AlexNet as the notebooks' book defines it (Dive into Deep Learning, section 8.1)."""

    name: Literal["alexnet"]
    input_size: Positive
    dropout: Share
    init: Init

    def windows(self) -> list[tuple[int, int, int]]:
        return [(11, 4, 1), (3, 2, 0), (5, 1, 2), (3, 2, 0), (3, 1, 1), (3, 1, 1), (3, 1, 1), (3, 2, 0)]


class VGG(Section):
    """VGG-11 as the notebooks' book defines it (Dive into Deep Learning, section 8.2)."""

    name: Literal["vgg"]
    input_size: Positive
    dropout: Share
    init: Init

    def windows(self) -> list[tuple[int, int, int]]:
        # The 3x3 convolutions keep the size; five 2x2 poolings halve it.
        return [(2, 2, 0)] * 5


class MLP(Section):
    """A multilayer perceptron with one wide hidden layer."""

    name: Literal["mlp"]
    input_size: Positive
    hidden_width: Positive
    dropout: Share
    init: Init

    def windows(self) -> list[tuple[int, int, int]]:
        return []


def smallest_image_size(model: NiN | LeNet | AlexNet | VGG | MLP) -> int:
    """The smallest height and width, in pixels, for which every layer of ``model`` has a non-empty output."""
    size = 1
    for kernel, stride, padding in reversed(model.windows()):
        # The output size of a convolution or pooling, floor((n + 2p - k) / s) + 1, solved for n.
        size = max(1, (size - 1) * stride + kernel - 2 * padding)
    return size
