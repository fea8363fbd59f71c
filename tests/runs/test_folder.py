import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from nin.config.schema import UserError
from nin.runs.files import open_atomically, write_atomically
from nin.runs.folder import RunClaimedError, RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    [
        "nin.log", "metrics.csv", "result.json", "checkpoints", "checkpoints/last.ckpt",
        "events.out.tfevents.1", ".hydra", ".hydra/config.yaml", ".hydra/lock", "csv/metrics.csv",
    ],
)  # fmt: skip
def test_a_symbolic_link_is_not_written_through(folder: RunFolder, tmp_path: Path, name: str) -> None:
    target, link = tmp_path / "target", folder.path / name
    if link.suffix or name.endswith("lock"):
        target.write_text("precious")
    else:
        target.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    with pytest.raises(UserError) as refused, folder.claim():
        pass
    assert str(refused.value) == f"{link}: a symbolic link, which would be written through; replace it by its target"
    assert target.is_dir() or target.read_text() == "precious"
    assert target.is_file() or not list(target.iterdir())


def test_a_logger_or_callback_may_make_links_within_the_folder(folder: RunFolder) -> None:
    (folder.path / "model_checkpoints").mkdir(parents=True)
    (folder.path / "model_checkpoints" / "last.ckpt").symlink_to("epoch=1.ckpt")
    with folder.claim():
        pass
    (folder.path / "model_checkpoints" / "out.ckpt").symlink_to(folder.path.parent)
    with pytest.raises(UserError, match=r"out.ckpt: a symbolic link, which would be written through"), folder.claim():
        pass


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize(
    "name",
    [
        "nin.log", "metrics.csv", "result.json", "events.out.tfevents.1", "hparams.yaml", "csv/metrics.csv",
        ".hydra/config.yaml", ".hydra/state.json", "checkpoints/.fresh.ckpt", "checkpoints/..fresh.ckpt.tmp",
        "checkpoints/best.ckpt", "checkpoints/last-1.ckpt",
    ],
)  # fmt: skip
def test_something_else_in_the_place_of_a_file_is_refused(
    folder: RunFolder, make: Callable[[Path], None], name: str
) -> None:
    path = folder.path / name
    path.parent.mkdir(parents=True)
    make(path)
    with pytest.raises(UserError) as refused, folder.claim():
        pass
    assert str(refused.value) == f"{path}: not a file; remove it"


def test_a_named_pipe_anywhere_is_refused(folder: RunFolder) -> None:
    (folder.path / "mine").mkdir(parents=True)
    os.mkfifo(pipe := folder.path / "mine" / "notes")
    with pytest.raises(UserError, match=f"^{pipe}: not a file; remove it$"), folder.claim():
        pass


@pytest.mark.parametrize("name", ["checkpoints", ".hydra"])
def test_a_file_in_the_place_of_a_folder_is_refused(folder: RunFolder, name: str) -> None:
    folder.path.mkdir()
    (folder.path / name).touch()
    with pytest.raises(UserError, match=rf"{name}: not a folder; remove it"), folder.claim():
        pass


@pytest.mark.parametrize("content", ["{}", "[]", "5", "", "{", "[" * 10**5, '{"status": 3}', '{"status": "done"}', "é"])
def test_another_result_is_named(folder: RunFolder, content: str) -> None:
    folder.path.mkdir()
    folder.result.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as refused:
        folder.read_result()
    assert str(refused.value) == f"{folder.result}: not the result of a run; remove it and run the command again"


@pytest.mark.parametrize(
    ("content", "state"),
    [
        ('{"starts": 5, "resumes": "x", "run_id": [], "pid": "1", "host": null, "more": 1}', {}),
        ('{"starts": "x", "resumes": 2, "run_id": "a", "pid": 1}', {"resumes": 2, "run_id": "a", "pid": 1}),
        ('{"starts": [{"git_commit": null}]}', {"starts": [{"git_commit": None}]}),
        ("[1]", {}),
        ("{", {}),
        ("[" * 10**5, {}),
    ],
)
def test_a_state_of_another_type_is_left_out(folder: RunFolder, content: str, state: dict) -> None:
    folder.state.parent.mkdir(parents=True)
    folder.state.write_text(content)
    assert folder.read_state() == state


@pytest.mark.parametrize("content", ["3", "foo", "a: 1", "- [1]", "- 1", "[", "- ${x", "\x00", "&a [*a]", "[" * 3000])
def test_other_overrides_are_named(folder: RunFolder, content: str) -> None:
    folder.overrides.parent.mkdir(parents=True)
    folder.overrides.write_text(content)
    with pytest.raises(UserError, match=r"overrides.yaml: (not a list of overrides|can't be read)"):
        folder.read_overrides()


@pytest.mark.parametrize("content", ["3", "- 1", "", "[", "a: ${x", "\x00", "a: &a [*a]", "[" * 3000])
def test_another_config_is_named(folder: RunFolder, content: str) -> None:
    folder.config.parent.mkdir(parents=True)
    folder.config.write_text(content)
    with pytest.raises(UserError, match=r"config.yaml: (not a run's config|can't be read)"):
        folder.read_request()


@pytest.mark.parametrize("name", ["result", "overrides", "config"])
def test_a_named_pipe_is_not_waited_for(folder: RunFolder, name: str) -> None:
    path: Path = getattr(folder, name)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=path.name):
        {"result": folder.read_result, "overrides": folder.read_overrides, "config": folder.read_request}[name]()


def test_a_claim_removes_what_killed_processes_were_writing(folder: RunFolder) -> None:
    number = "0123456789ab"
    leftovers = [
        folder.path / f"{name}.{number}.tmp" for name in (".a", ".hydra/.state.json", "checkpoints/.best.ckpt")
    ]
    for leftover in leftovers:
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.touch()
    with folder.claim():
        assert not any(leftover.exists() for leftover in leftovers)


def test_a_refused_claim_leaves_no_new_folders(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "outputs" / "runs" / "x")
    with pytest.raises(UserError, match="refused"), folder.claim():
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_on_a_full_disk_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "runs" / "full")

    def fail(**state: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder, "update_state", fail)
    with pytest.raises(UserError) as refused, folder.claim():
        pass
    assert str(refused.value) == f"{folder.path}: can't be written ({os.strerror(errno.ENOSPC)}); free some space"
    assert not (tmp_path / "runs").exists()


def test_a_refused_claim_holds_its_lock_until_its_folder_is_removed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    existed: list[bool] = []
    release = FileLock.release

    def watch(lock: FileLock, force: bool = False) -> None:
        existed.append(folder.config.parent.exists())
        release(lock, force)

    monkeypatch.setattr("nin.runs.folder.FileLock.release", watch)
    with pytest.raises(UserError, match="refused"), folder.claim():
        raise UserError("refused")
    assert existed[0] is False  # after it a third process could claim what is about to be removed


def test_two_claims_are_never_held_at_once(folder: RunFolder) -> None:
    holders, most, claims = 0, 0, 0

    def claim() -> None:
        nonlocal holders, most, claims
        for _ in range(40):
            try:
                with folder.claim():
                    holders += 1
                    most = max(most, holders)
                    time.sleep(0.0005)
                    holders -= 1
                    claims += 1
                    raise UserError("refused")
            except RunClaimedError:
                time.sleep(0.0005)
            except UserError as error:  # the folder may be removed while another thread looks into it
                assert str(error) == "refused" or "can't be written" in str(error)  # noqa: PT017

    threads = [threading.Thread(target=claim) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, holders) == (1, 0)
    assert claims > 0


def test_event_files_are_cut_to_their_sizes_and_incomplete_ones_are_named(folder: RunFolder) -> None:
    folder.path.mkdir()
    long, short, new, lost = (f"events.out.tfevents.{i}" for i in range(4))
    for name, size in ((long, 10), (short, 3), (new, 5), ("events.csv", 20)):
        (folder.path / name).write_bytes(b"x" * size)
    assert folder.truncate_event_files({long: 8, short: 8, lost: 8}) == [short, lost]
    assert folder.event_file_sizes() == {long: 8, short: 3}
    assert (folder.path / "events.csv").stat().st_size == 20  # not TensorBoard's


def test_a_file_that_can_not_be_written_is_named_and_not_its_temporary_one() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(Path("/proc/summary.csv"), "")  # a folder in which no one can create files
    assert caught.value.filename == "/proc/summary.csv"


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "summary.png"
    with open_atomically(path) as first, open_atomically(path) as second:
        first.write(b"first")
        write_atomically(path, "third")
        assert path.read_text() == "third"
        second.write(b"second")
    assert path.read_text() == "first"  # it ended last
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_replaces_another_and_its_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another order a loss of power could leave an empty file in the place of the one before it."""
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        state = os.fstat(descriptor)
        events.append(("folder", state.st_ino) if stat.S_ISDIR(state.st_mode) else ("file", state.st_size))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        events.append(("replace", Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomically(tmp_path / "result.json", "text")
    assert events == [("file", 4), ("replace", 4), ("folder", tmp_path.stat().st_ino)]


def test_a_result_that_can_not_be_written_leaves_the_one_before_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    folder.write_result({"status": "finished"})
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        folder.write_result({"status": "failed"})
    assert folder.read_result() == {"status": "finished"}
    assert list(folder.path.iterdir()) == [folder.result]


def test_what_a_killed_process_was_writing_is_removed_an_hour_later(tmp_path: Path) -> None:
    names = (".a[1].csv.1f.tmp", ".a[1].csv.2f.tmp", ".a1.csv.1f.tmp", ".b.csv.1f.tmp")
    for name in names:
        (tmp_path / name).touch()
        if "2f" not in name:
            os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    write_atomically(tmp_path / "a[1].csv", "new")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a[1].csv", ".a[1].csv.2f.tmp", ".a1.csv.1f.tmp", ".b.csv.1f.tmp"}


def test_a_link_that_appears_while_a_file_is_written_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target := tmp_path / "target").write_text("precious")
    with_name = Path.with_name

    def link_there(path: Path, name: str) -> Path:
        (link := with_name(path, name)).symlink_to(target)
        return link

    with monkeypatch.context() as patch:
        patch.setattr(Path, "with_name", link_there)
        with pytest.raises(FileExistsError):
            write_atomically(tmp_path / "result.json", "new")
    assert target.read_text() == "precious"
    assert not (tmp_path / "result.json").exists()


def test_a_config_whose_values_refer_to_each_other_is_refused(folder: RunFolder) -> None:
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40))]
    folder.config.parent.mkdir(parents=True)
    folder.config.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"can't be read \(a value refers to another one"):
        folder.read_request()


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file"):
        write_atomically(pipe, "text")
    assert pipe.is_fifo()
    assert [*tmp_path.iterdir()] == [pipe]
