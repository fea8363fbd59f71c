"""The base classes of the config's sections, and types with a range. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of the config. Strict: ``"1"`` and ``true`` are not accepted for 1, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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
        """The arguments of the class: all keys that the section itself does not declare."""
        return dict(self.model_extra or {})


NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# Kernel size, stride or image size in pixels. The limit refuses absurd values before they cost time and memory.
Pixels = Annotated[int, Field(ge=1, le=1024)]
# The number of channels or features of a layer.
Width = Annotated[int, Field(ge=1, le=65_536)]
# Lightning's values of ``precision``, and "auto".
Precision = Literal[
    "auto", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "transformer-engine",
    "transformer-engine-float16", "32", "16", "bf16", "64", 32, 16, 64,
]  # fmt: skip
Init = Literal["xavier_uniform", "kaiming_normal", "kaiming_dirac", "kaiming_dirac_pca", "torch"]
