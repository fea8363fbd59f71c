import os
import time
from pathlib import Path

import pytest

from nin.runs.files import open_atomically, write_atomically


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "summary.png"
    with open_atomically(path) as first, open_atomically(path) as second:
        first.write(b"first")
        write_atomically(path, "third")
        assert path.read_text() == "third"
        second.write(b"second")
    assert path.read_text() == "first"  # it ended last
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_was_writing_is_removed_an_hour_later(tmp_path: Path) -> None:
    names = (".a[1].csv.tmp", ".a[1].csv.1f.tmp", ".a[1].csv.2f.tmp", ".a1.csv.1f.tmp", ".b.csv.1f.tmp")
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
