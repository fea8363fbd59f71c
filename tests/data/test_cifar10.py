import hashlib
import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nin.config.schema import Data, UserError
from nin.data import cifar10, sources

ARRAYS = [np.arange(i, i + 4 * 3072).reshape(4, 3072).astype(np.uint8) for i in range(6)]


def archive_of(path: Path, batches: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, batch in batches.items():
            content = pickle.dumps(batch, protocol=2)  # as in the published archive
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def batches() -> dict[str, object]:
    names = [*cifar10._BATCHES["train"], *cifar10._BATCHES["test"]]
    return {name: {b"data": ARRAYS[i], b"labels": [i, 1, 2, 9]} for i, name in enumerate(names)}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    path = tmp_path / "CIFAR10" / "raw" / cifar10.ARCHIVE
    archive_of(path, batches())
    monkeypatch.setitem(sources.PUBLISHED, "cifar10", {path.name: hashlib.sha256(path.read_bytes()).hexdigest()})
    return Data(
        name="cifar10", root=str(tmp_path), image_size=32, batch_size=4, val_size=2, score_each_epoch="val",
        augment="none", normalize=False, test_time_flip=False, mirrors=[],
    )  # fmt: skip


def test_images_and_labels_are_read_in_the_order_of_the_batches(data: Data) -> None:
    sources.prepare(data)
    images, labels = sources.load(data, "train")
    assert (images.shape, images.dtype) == ((20, 32, 32, 3), np.uint8)
    assert labels.tolist() == [label for i in range(5) for label in (i, 1, 2, 9)]
    # The file has all red values of an image, then all green, then all blue ones.
    assert images[5, 2, 7].tolist() == [int(ARRAYS[1][1, c * 1024 + 2 * 32 + 7]) for c in range(3)]
    assert sources.load(data, "test")[1].tolist() == [5, 1, 2, 9]


def test_an_altered_archive_is_refused(data: Data) -> None:
    path = Path(data.root) / "CIFAR10" / "raw" / cifar10.ARCHIVE
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not the published file .* remove it and run the command again"):
        sources.prepare(data)


def test_a_missing_archive_without_a_mirror_is_named(data: Data) -> None:
    (Path(data.root) / "CIFAR10" / "raw" / cifar10.ARCHIVE).unlink()
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz of cifar10 .*\n  data.mirrors is empty"):
        sources.prepare(data)


def test_the_archive_is_downloaded_and_stays_packed(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.utils.download_url", shutil.copy)
    path = Path(data.root) / "CIFAR10" / "raw" / cifar10.ARCHIVE
    (tmp_path / "mirror").mkdir()
    (tmp_path / "other").mkdir()
    path.rename(tmp_path / "mirror" / path.name)
    (tmp_path / "other" / path.name).write_bytes(b"another file")
    mirrors = [str(tmp_path / name) for name in ("other", "mirror")]
    sources.prepare(data.model_copy(update={"mirrors": mirrors}))
    assert [file.name for file in path.parent.iterdir() if file.name != ".lock"] == [cifar10.ARCHIVE]
    assert sources.load(data, "test")[1].tolist() == [5, 1, 2, 9]


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("batch", [Attack(), {b"data": Attack(), b"labels": []}, {b"labels": []}, 3])
def test_a_batch_is_data_and_never_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: object) -> None:
    monkeypatch.chdir(tmp_path)
    archive_of(tmp_path / "archive.tar.gz", {"test_batch": batch})
    with pytest.raises(UserError, match="not the archive of CIFAR-10"):
        cifar10.read(tmp_path / "archive.tar.gz", "test")
    assert not (tmp_path / "attacked").exists()
