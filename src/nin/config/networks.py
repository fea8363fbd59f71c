"""The typed config of each network, and the smallest image that it can take. Imports no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Strict: a number is not a word, ``true`` is not 1, and a key that nobody reads is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Init = Literal["xavier_uniform", "kaiming_normal", "kaiming_dirac", "torch"]


class NiN(Section):
    """Network in Network (Lin et al. 2013) as the notebooks build it; ``nin_small`` is the same at 28x28."""

    name: Literal["nin"]
    input_size: Positive
    # A block's entry is the width of all its layers, or lists each layer's.
    widths: Annotated[list[Positive | list[Positive]], Field(min_length=1)]
    last_width: Positive | None
    kernel_sizes: list[Positive]
    first_stride: Positive
    first_padding: Annotated[int, Field(ge=0)]
    conv1x1_layers: Annotated[int, Field(ge=0)]
    conv1x1_relu: bool
    head: Literal["gap", "fc", "mlp"]
    head_width: Positive
    dropout: Share
    dropout_between: bool
    norm: Literal["none", "batch"]
    init: Init
    final_relu: bool

    @model_validator(mode="after")
    def one_kernel_a_block(self):
        if len(self.kernel_sizes) != len(self.widths) + 1:
            raise ValueError(
                f"kernel_sizes has {len(self.kernel_sizes)} entries and widths {len(self.widths)}: "
                "give one kernel size a block, that is one more than widths (the last block's width is the classes')"
            )
        if even := [k for k in self.kernel_sizes[1:] if k % 2 == 0]:
            raise ValueError(f"kernel_sizes={self.kernel_sizes}: {even[0]} is even; all but the first must be odd")
        return self

    @model_validator(mode="after")
    def one_width_a_layer(self):
        layers = 1 + self.conv1x1_layers
        if other := [w for w in self.widths if isinstance(w, list) and len(w) != layers]:
            raise ValueError(
                f"widths has {other[0]} for a block of {layers} layers (the convolution and conv1x1_layers="
                f"{self.conv1x1_layers}): give one width a layer, or one number for all"
            )
        return self

    def windows(self) -> list[tuple[int, int, int]]:
        """Every layer that shrinks the image, in order: (kernel, stride, padding)."""
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
    """The smallest square image, in pixels a side, from which every layer of ``model`` has something to compute."""

    def fits(size: int) -> bool:
        for kernel, stride, padding in model.windows():
            if size + 2 * padding < kernel:
                return False
            size = (size + 2 * padding - kernel) // stride + 1
        return True

    return next(size for size in range(1, 100_000) if fits(size))
