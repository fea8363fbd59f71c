import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nin.checkpoints import files as checkpoint_files
from nin.checkpoints.files import AtomicCheckpointIO
from nin.config.schema import Settings, UserError
from nin.training.classifier import Classifier


class Crafted:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch it-ran",))


def save_with_checksum(content: object, path: Path) -> None:
    """A file with a valid checksum, as somebody who knows the format can write it."""
    torch.save(content, path)
    data = bytearray(path.read_bytes())
    data[-2:] = (64).to_bytes(2, "little")
    path.write_bytes(data + hashlib.sha256(data).hexdigest().encode())


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_with_checksum, "refused: it is not a checkpoint, or holds more than tensors"),
        (torch.save, "does not end with a checksum"),
        (lambda content, path: path.write_bytes(pickle.dumps(content)), "does not end with a checksum"),
    ],
)
def test_a_crafted_pickle_is_refused_and_nothing_in_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[object, Path], object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.ckpt"
    save({"state_dict": Crafted()}, path)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        checkpoint_files.read(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.ckpt"]


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint_files.read(tmp_path / "none.ckpt")
    save_with_checksum({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of this version of nin: state_dict, hyper_parameters, "):
        checkpoint_files.read(tmp_path / "other.ckpt")


def test_a_checkpoint_of_another_version_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"old.ckpt: saved by another version of nin\?\n(?s:.*)model.depth: no such key"
    ):
        checkpoint_files.settings_of(
            {"hyper_parameters": {"settings": {"model": {"name": "nin", "depth": 3}}}}, tmp_path / "old.ckpt"
        )


def test_a_save_that_fails_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "hyper_parameters": {}}, path)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        AtomicCheckpointIO().save_checkpoint({"state_dict": lambda: None}, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_compiled_networks_checkpoint_loads_into_an_eager_one_and_back(settings: Callable[..., Settings]) -> None:
    compiled, eager = Classifier(settings(), "abcdefghij"), Classifier(settings("seed=1"), "abcdefghij")
    compiled.network.compile(backend="eager")
    eager.load_state_dict(compiled.state_dict())
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(compiled.eval()(images), eager.eval()(images))
    compiled.load_state_dict(eager.state_dict())
