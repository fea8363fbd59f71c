"""The typed config of each network. Imports no torch."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of the config. Strict: ``"1"`` and ``true`` are not accepted for 1, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
# Of a kernel, stride or image, in pixels. More than any image has would only take time and memory to refuse.
Pixels = Annotated[int, Field(ge=1, le=1024)]
Width = Annotated[int, Field(ge=1, le=65_536)]
# Kernel size, stride and padding of the layers that reduce height and width, in order.
Windows = list[tuple[int, int, int]]
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


class LeNet(Section):
    """LeNet-5 as the notebooks' book defines it (Dive into Deep Learning, section 7.6)."""

    name: Literal["lenet"]
    input_size: Positive
    init: Init

    windows: ClassVar[Windows] = [(5, 1, 2), (2, 2, 0), (5, 1, 0), (2, 2, 0)]


class AlexNet(Section):
    """AlexNet as the notebooks' book defines it (Dive into Deep Learning, section 8.1)."""

    name: Literal["alexnet"]
    input_size: Positive
    dropout: Share
    init: Init

    windows: ClassVar[Windows] = [
        (11, 4, 1),
        (3, 2, 0),
        (5, 1, 2),
        (3, 2, 0),
        (3, 1, 1),
        (3, 1, 1),
        (3, 1, 1),
        (3, 2, 0),
    ]


class VGG(Section):
    """VGG-11 as the notebooks' book defines it (Dive into Deep Learning, section 8.2)."""

    name: Literal["vgg"]
    input_size: Positive
    dropout: Share
    init: Init

    # The 3x3 convolutions keep the size; five 2x2 poolings halve it.
    windows: ClassVar[Windows] = [(2, 2, 0)] * 5


class OwnClass(Section):
    """A class of the user's own, named by ``_target_``; all other keys are its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)

    target: Annotated[str, Field(alias="_target_", pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]

    @property
    def name(self) -> str:
        """The class with its module, in place of the name of a network or data set of this project."""
        return self.target

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class OwnModel(OwnClass):
    """Any ``nn.Module`` that maps ``(batch, channels, image_size, image_size)`` to logits ``(batch, classes)``."""

    # The default of data.image_size.
    input_size: Positive

    windows: ClassVar[Windows] = []


class MLP(Section):
    """A multilayer perceptron with one wide hidden layer."""

    name: Literal["mlp"]
    input_size: Positive
    hidden_width: Positive
    dropout: Share
    init: Init

    windows: ClassVar[Windows] = []
