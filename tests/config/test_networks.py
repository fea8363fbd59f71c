"""A network's keys are read from its signature."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from nin.config.networks import read_networks

SIGNATURE = "in_channels: int, num_classes: int, image_size: int"
FILES = {
    "my_net.py": f"import torch_is_not_imported\n\n\nclass MyNet:\n    def __init__(self, {SIGNATURE}, *, "
    "depth: Positive, share: Fraction | None, sizes: Annotated[Sequence[Pixels], Field(max_length=2)], "
    "kind: Literal['a', 'b'] = 'a'):\n        pass\n",
    "layers.py": "class Layers:\n    def __init__(self, width):\n        pass\n",
    "other.py": f"class NotItsName:\n    def __init__(self, {SIGNATURE}):\n        pass\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_annotations_are_types_and_ranges(folder: Path) -> None:
    found = read_networks(folder)
    assert list(found) == ["my_net"]  # a class of its file's name, which takes what the data give
    section = found["my_net"]
    assert (section.__name__, list(section.model_fields)) == (
        "MyNet", ["name", "input_size", "init", "depth", "share", "sizes", "kind"]
    )  # fmt: skip
    valid = {"name": "my_net", "input_size": 28, "init": "torch", "depth": 1, "share": None, "sizes": [3], "kind": "a"}
    section.model_validate(valid)
    for key, value in {"depth": 0, "share": 1, "sizes": [1, 2, 3], "kind": "c", "name": "nin", "width": 1}.items():
        with pytest.raises(ValidationError, match=key):
            section.model_validate(valid | {key: value})
    for key in valid:  # defaults stand in conf/ alone
        with pytest.raises(ValidationError, match="Field required"):
            section.model_validate({k: v for k, v in valid.items() if k != key})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("width", "width has no annotation"),
        ("width: Tensor", "width: name 'Tensor' is not defined; use names of typing"),
    ],
)
def test_an_annotation_that_can_not_be_used(folder: Path, argument: str, message: str) -> None:
    (folder / "my_net.py").write_text(FILES["my_net.py"].replace("depth: Positive", argument))
    with pytest.raises(TypeError, match=message):
        read_networks(folder)
