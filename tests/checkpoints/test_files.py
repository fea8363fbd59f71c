import errno
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import ENVIRONMENT
from nin.checkpoints import files as checkpoint_files
from nin.checkpoints.checkpoint_io import AtomicCheckpointIO
from nin.checkpoints.files import resume_candidates, rotate_checkpoints
from nin.config.schema import Settings, UserError
from nin.runs.folder import RunFolder
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
        checkpoint_files.read_checkpoint_settings(
            {"hyper_parameters": {"settings": {"model": {"name": "nin", "depth": 3}}}}, tmp_path / "old.ckpt"
        )


def test_a_state_that_can_not_be_saved_leaves_the_file_before_it(tmp_path: Path) -> None:
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


CONTENT = {"state_dict": {}, "hyper_parameters": {}, "global_step": 1, "epoch": 0}


def test_a_checkpoint_without_a_valid_checksum_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert checkpoint_files.read(path) == CONTENT
    intact = path.read_bytes()
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 1
    damaged = [intact[:-cut] for cut in range(1, 90)]
    damaged += [bytes(flipped), bytes(flipped) + b"x", intact + b"x", intact + b"\0" * 86, b"x" + intact, b""]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"last.ckpt: damaged.* checksum$"):
            checkpoint_files.read(path)
    (tmp_path / "best.ckpt").write_bytes(intact)
    with pytest.raises(UserError, match=r"last.ckpt: damaged.* checksum; other checkpoints there: best.ckpt$"):
        checkpoint_files.read(path)


def test_lightning_loads_no_damaged_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == CONTENT
    torch.save(CONTENT, path)  # without a checksum
    with pytest.raises(UserError, match=r"last.ckpt: damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize(
    "callbacks", [{}, {"ResumableCheckpoint": {}}, {"ResumableCheckpoint": [1]}, {"ResumableCheckpoint": {"format": 0}}]
)
def test_a_checkpoint_without_the_state_that_resuming_needs_is_refused(
    settings: Callable[..., Settings], callbacks: dict[str, Any]
) -> None:
    checkpoint = CONTENT | {"hyper_parameters": {"settings": settings().model_dump(mode="json")}}
    whole = checkpoint | {"callbacks": {"ResumableCheckpoint": {"format": checkpoint_files.STATE_FORMAT}}}
    checkpoint_files.require_same_run(whole, Path("last.ckpt"), settings(), None)
    with pytest.raises(UserError, match=r"last.ckpt: can't be resumed: it has no state of the training, or that of "):
        checkpoint_files.require_same_run(checkpoint | {"callbacks": callbacks}, Path("last.ckpt"), settings(), None)


@pytest.mark.parametrize(
    ("key", "value"),
    [("global_step", None), ("global_step", "1"), ("hyper_parameters", []), ("state_dict", 5), ("epoch", 1.5)],
)
def test_a_checkpoint_that_lacks_a_part_is_named(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "last.ckpt"
    content = {k: v for k, v in (CONTENT | {key: value}).items() if v is not None}
    AtomicCheckpointIO().save_checkpoint(content, path)
    with pytest.raises(UserError, match=rf"not a checkpoint of this version of nin: {key} missing or of another type"):
        checkpoint_files.read(path)
    AtomicCheckpointIO().save_checkpoint([], path)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"not a checkpoint of nin: it holds a list"):
        checkpoint_files.read(path)


@pytest.mark.parametrize(
    "hyper_parameters",
    [{}, *({"settings": stored} for stored in (None, [], {"seed": "x"}, {5: 1}, {"seed": torch.zeros(2)}))],
)
def test_settings_of_another_type_are_named(tmp_path: Path, hyper_parameters: dict) -> None:
    with pytest.raises(UserError, match=r"x.ckpt: saved by another version of nin\?"):
        checkpoint_files.read_checkpoint_settings({"hyper_parameters": hyper_parameters}, tmp_path / "x.ckpt")


def test_a_named_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "device.ckpt").symlink_to("/dev/null")  # as well as /dev/zero, which has no end
    for name in ("pipe.ckpt", "device.ckpt"):
        with pytest.raises(UserError, match=f"{name}: not a file"):
            checkpoint_files.read(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 1, 11])
def test_publish_keeps_as_many_earlier_checkpoints(tmp_path: Path, keep: int) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for number in range(1, 14):
        folder.fresh.write_text(str(number))
        rotate_checkpoints(folder, best=number == 2, keep=keep)
    (folder.checkpoints / "last-².ckpt").touch()  # a digit that is no number
    found = {path.name: path.read_text() for path in folder.checkpoints.iterdir() if "²" not in path.name}
    older = {f"last-{i}.ckpt": str(13 - i) for i in range(1, keep + 1)}
    assert found == {"last.ckpt": "13", "best.ckpt": "2", **older}
    assert [path.name for path in resume_candidates(folder)] == ["last.ckpt", *older, "best.ckpt"]


def test_a_full_disk_while_the_best_is_copied_has_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    folder.fresh.write_bytes(bytes(2_000_000))
    folder.best.write_text("the best before")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="the checkpoint of 2 MB could not be saved, the previous one is kept; free some"):
        rotate_checkpoints(folder, best=True, keep=1)
    assert folder.best.read_text() == "the best before"


def test_a_damaged_checkpoint_is_renamed_only_where_that_is_requested(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    content = {"state_dict": {}, "hyper_parameters": {}, "global_step": 1, "epoch": 0}
    AtomicCheckpointIO().save_checkpoint(content, folder.best)
    folder.last.write_bytes(b"damaged")
    for rename, name in ((False, "last.ckpt"), (True, "last.ckpt.damaged-0")):
        found = checkpoint_files.load_newest_valid(folder, rename)
        assert found == (folder.best, content)
        assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["best.ckpt", name]


@pytest.mark.parametrize(
    ("best", "is_resumed"), [((7, 3), True), ((6, 3), True), ((6, 2), False), ((5, 3), False), (None, False)]
)
def test_a_best_checkpoint_that_is_later_than_the_last_is_resumed(
    tmp_path: Path, best: tuple[int, int] | None, is_resumed: bool
) -> None:
    """A run was killed between the renames, or its last.ckpt is an earlier one."""

    def save(path: Path, step: int, epochs: int) -> None:
        loops = {"fit_loop": {"epoch_progress": {"current": {"processed": epochs}}}}
        content = {"state_dict": {}, "hyper_parameters": {}, "global_step": step, "epoch": epochs, "loops": loops}
        AtomicCheckpointIO().save_checkpoint(content, path)

    folder = RunFolder(tmp_path)
    save(folder.last, 6, 2)
    if best:
        save(folder.best, *best)
    else:
        folder.best.write_bytes(b"damaged")
    found = checkpoint_files.load_newest_valid(folder, rename=True)
    assert found is not None
    assert found[0] == (folder.best if is_resumed else folder.last)
    assert (found[1]["global_step"], found[1]["epoch"]) == (best if is_resumed else (6, 2))


# Each event is in a process of its own, which kills itself.
KILLED_WHILE_PUBLISHING = """
import itertools, os, signal, sys
from pathlib import Path
from nin.checkpoints.files import rotate_checkpoints, resume_candidates
from nin.runs.folder import RunFolder

def publish_until(event, folder, keep):
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    events = itertools.count(1)
    for name in ("replace", "fsync"):
        def counted(*given, real=getattr(os, name)):
            if next(events) == event:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*given)
        setattr(os, name, counted)
    rotate_checkpoints(folder, best=True, keep=keep)
    os._exit(0)

for keep in (0, 2):
    for event in itertools.count(1):
        folder = RunFolder(Path(sys.argv[1], f"{keep}-{event}"))
        folder.checkpoints.mkdir(parents=True)
        for file, content in ((folder.last, "4"), (folder.best, "2"), (folder.fresh, "5")):
            file.write_text(content)
        status = publish_until(event, folder, keep)
        newest = next(path for path in resume_candidates(folder) if path.exists())
        print(status, newest.read_text(), folder.best.read_text())
        if status == 0:
            break
"""


def test_killed_while_it_publishes_a_best_checkpoint_the_best_is_never_older_than_the_last_says(tmp_path: Path) -> None:
    program = [sys.executable, "-c", KILLED_WHILE_PUBLISHING, str(tmp_path)]
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    states = done.stdout.splitlines()
    # From 4 with the best 5, the run resumes from the best.
    assert set(states) == {"-9 4 2", "-9 4 5", "-9 5 5", "0 5 5"}
    assert states.count("0 5 5") == 2


def test_nothing_outside_of_the_runs_folder_is_written_or_removed(tmp_path: Path) -> None:
    """The path may be of a config, or of a callback's state in a checkpoint from elsewhere."""
    folder, victim = tmp_path / "run", tmp_path / "victim"
    for path in (folder / "model_checkpoints" / "a.ckpt", victim / "best.ckpt"):
        path.parent.mkdir(parents=True)
        path.touch()
    (folder / "link.ckpt").symlink_to(victim / "best.ckpt")
    (folder / "linked").symlink_to(victim)
    restricted = AtomicCheckpointIO([folder])
    outside = [
        f"local://{victim}", victim, victim / "best.ckpt", folder / ".." / "victim" / "best.ckpt", folder / "link.ckpt",
        folder / "linked" / "best.ckpt", folder / "model_checkpoints", "http://127.0.0.1:1/best.ckpt",
    ]  # fmt: skip
    for path in outside:
        restricted.remove_checkpoint(path)
    assert (victim / "best.ckpt").exists()
    assert (folder / "model_checkpoints" / "a.ckpt").exists()
    restricted.remove_checkpoint(folder / "model_checkpoints" / "a.ckpt")
    assert not (folder / "model_checkpoints" / "a.ckpt").exists()
    for path in (folder / ".." / "victim" / "best.ckpt", folder / "linked" / "new.ckpt"):
        with pytest.raises(UserError, match="outside of the run's folder; set the dirpath of the callback"):
            restricted.save_checkpoint(CONTENT, path)
    restricted.save_checkpoint(CONTENT, folder / "model_checkpoints" / "b" / "c.ckpt")
    assert sorted(path.name for path in victim.iterdir()) == ["best.ckpt"]


def test_settings_that_stand_for_very_many_values_are_refused(tmp_path: Path) -> None:
    values: list[Any] = [0] * 10
    for _ in range(20):
        values = [values] * 10
    content = {"hyper_parameters": {"settings": {"callbacks": {"a": {"b": values}}}}}
    with pytest.raises(UserError, match="its settings have more than 100,000 values"):
        checkpoint_files.read_checkpoint_settings(content, tmp_path / "x.ckpt")
    values.append(values)
    with pytest.raises(UserError, match="its settings have more than 100,000 values"):
        checkpoint_files.read_checkpoint_settings(content, tmp_path / "x.ckpt")
