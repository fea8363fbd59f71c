"""Missing, damaged and altered files of data sets, and their download, on small files that the tests write."""

import gzip
import hashlib
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from torchvision import datasets

from nin.config.composition import compose_config
from nin.config.schema import Data, UserError
from nin.config.validation import validate
from nin.data import garments
from nin.data import sources as files

NAMES = list(files.FILES)


def small_set() -> dict[str, bytes]:
    """Four well-formed IDX files with six training and four test images."""
    random, contents = np.random.default_rng(0), {}
    for part, count in (("train", 6), ("t10k", 4)):
        header = np.array([0x0803, count, 28, 28], ">u4").tobytes()
        contents[f"{part}-images-idx3-ubyte"] = header + random.bytes(count * 784)
        contents[f"{part}-labels-idx1-ubyte"] = np.array([0x0801, count], ">u4").tobytes() + bytes(range(count))
    return contents


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The contents of a small data set that takes the place of the published ones, with its checksums."""
    contents = small_set()
    for name, content in contents.items():
        for data_set in files.PUBLISHED.values():
            monkeypatch.setitem(data_set, name, hashlib.sha256(content).hexdigest())
        packed = hashlib.sha256(gzip.compress(content, mtime=0)).hexdigest()
        monkeypatch.setitem(files.PUBLISHED_PACKED["kmnist"], name, packed)
    return contents


@pytest.fixture(scope="session")
def config() -> Data:
    return validate(compose_config([])).data


@pytest.fixture
def data(config: Data) -> Callable[..., Data]:
    return lambda root, *mirrors, name="fashion_mnist": config.model_copy(
        update={"root": str(root), "mirrors": list(mirrors), "name": name}
    )


def put(root: Path, contents: dict[str, bytes]) -> Path:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in contents.items():
        (raw / name).write_bytes(content)
    return raw


def test_intact_files_are_read_and_nothing_is_written_beside_them(
    tmp_path: Path, published: dict[str, bytes], data: Callable[..., Data]
) -> None:
    raw = put(tmp_path, published)
    files.prepare(data(tmp_path))
    images, labels = files.load(data(tmp_path), "train")
    assert (images.shape, images.dtype) == ((6, 28, 28), np.uint8)
    assert (labels.tolist(), labels.dtype) == ([0, 1, 2, 3, 4, 5], np.int64)
    assert images.tobytes() == published["train-images-idx3-ubyte"][16:]
    assert sorted(path.name for path in raw.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("verified_before", [False, True])
def test_one_altered_bit_is_noticed(
    tmp_path: Path, published: dict[str, bytes], verified_before: bool, data: Callable[..., Data]
) -> None:
    raw = put(tmp_path, published)
    state = (raw / NAMES[0]).stat()
    if verified_before:
        files.prepare(data(tmp_path))
    changed, probe = (raw / NAMES[0]).stat().st_ctime_ns, tmp_path / "probe"
    while not probe.exists() or probe.stat().st_ctime_ns <= changed:  # the kernel's clock for files has steps
        probe.write_bytes(b"")
    content = bytearray(published[NAMES[0]])
    content[1000] ^= 1
    (raw / NAMES[0]).write_bytes(content)
    os.utime(raw / NAMES[0], ns=(state.st_atime_ns, state.st_mtime_ns))  # size and time are as they were
    with pytest.raises(UserError, match=f"{NAMES[0]}: not the published file .* remove it and run the command again"):
        files.prepare(data(tmp_path))


def test_a_cut_off_file_is_noticed(tmp_path: Path, published: dict[str, bytes], data: Callable[..., Data]) -> None:
    raw = put(tmp_path, published)
    (raw / NAMES[2]).write_bytes(published[NAMES[2]][:-1])
    with pytest.raises(UserError, match=f"{NAMES[2]}: not the published file"):
        files.prepare(data(tmp_path))


def test_a_missing_file_is_named_with_the_ways_to_bring_it(
    tmp_path: Path, published: dict[str, bytes], data: Callable[..., Data]
) -> None:
    raw = put(tmp_path, published)
    (raw / NAMES[3]).unlink()
    with pytest.raises(UserError) as caught:
        files.prepare(data(tmp_path, "http://127.0.0.1:1/", "http://127.0.0.1:1/x/"))
    assert str(caught.value).startswith(f"{NAMES[3]} of fashion_mnist is not in {raw}")
    for remedy in ("Connection refused", "copy these unpacked files", "NIN_DATA", "data=garments"):
        assert remedy in str(caught.value)
    assert "  http://127.0.0.1:1/, http://127.0.0.1:1/x/: " in str(caught.value)
    assert str(caught.value).count("Connection refused") == 1  # the reason of both


def test_what_could_not_be_fetched_leaves_nothing_behind(tmp_path: Path, data: Callable[..., Data]) -> None:
    with pytest.raises(UserError, match="could not be downloaded"):
        files.prepare(data(tmp_path / "new" / "root", "http://127.0.0.1:1/"))
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written(tmp_path: Path, data: Callable[..., Data]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't be written \(Not a directory\).*NIN_DATA"):
        files.prepare(data(tmp_path / "file"))


def test_as_many_labels_as_images(tmp_path: Path, data: Callable[..., Data]) -> None:
    contents = small_set()
    put(tmp_path, contents | {NAMES[1]: contents["t10k-labels-idx1-ubyte"]})
    with pytest.raises(UserError, match="train has 6 images and 4 labels"):
        files.load(data(tmp_path), "train")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x1f\x8b gzip, still packed",
        small_set()[NAMES[0]][:-1],
        small_set()[NAMES[0]] + b"x",
        small_set()["train-labels-idx1-ubyte"],
        b"\0\0\x0d" + small_set()[NAMES[0]][3:],  # floats
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, content: bytes, data: Callable[..., Data]) -> None:
    raw = put(tmp_path, small_set() | {NAMES[0]: content})
    with pytest.raises(UserError, match=f"^{raw / NAMES[0]}: not an IDX file, cut off or too long"):
        files.load(data(tmp_path), "train")


def test_reading_before_the_files_are_there(tmp_path: Path, data: Callable[..., Data]) -> None:
    with pytest.raises(UserError, match=r"can't be read \(No such file or directory\); run the command again, or"):
        files.load(data(tmp_path), "train")


def test_a_label_without_a_class(tmp_path: Path, data: Callable[..., Data]) -> None:
    contents = small_set()
    put(tmp_path, contents | {NAMES[1]: contents[NAMES[1]][:-1] + bytes([10])})
    with pytest.raises(UserError, match="train has the label 10, and there are 10 classes; remove the folder"):
        files.load(data(tmp_path), "train")


class Mirror(ThreadingHTTPServer):
    """Serves gzipped files on loopback and records the requests."""

    def __init__(self, contents: dict[str, bytes], changed: Callable[[bytes], bytes] = lambda packed: packed):
        requests = self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requests.append(self.path)
                content = contents.get(self.path.rsplit("/", 1)[-1].removesuffix(".gz"))
                self.send_response(404 if content is None else 200)
                packed = changed(gzip.compress(content or b"", mtime=0))
                self.send_header("Content-Length", str(len(packed)))
                self.end_headers()
                self.wfile.write(packed)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/files/"
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def mirrors(published: dict[str, bytes]) -> Iterator[list[Mirror]]:
    altered = {name: content[:-1] + b"\xff" for name, content in published.items()}
    servers = [Mirror({}), Mirror(altered), Mirror(published)]
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


def test_mirrors_are_tried_until_one_has_the_published_file(
    tmp_path: Path, published: dict[str, bytes], mirrors: list[Mirror], data: Callable[..., Data]
) -> None:
    requested = data(tmp_path, *(m.url for m in mirrors))
    files.prepare(requested)
    raw = files.raw_folder(requested)
    assert {name: (raw / name).read_bytes() for name in NAMES} == published
    assert [sorted({path.split("/")[-1].removesuffix(".gz") for path in m.requests}) for m in mirrors] == [
        sorted(NAMES)
    ] * 3
    assert sorted(p.name for p in raw.iterdir()) == sorted([*NAMES, ".lock"])


def test_after_a_mirror_that_breaks_off_or_is_none_the_next_is_tried(
    tmp_path: Path, published: dict[str, bytes], mirrors: list[Mirror], data: Callable[..., Data]
) -> None:
    cut, page = (
        Mirror(published, lambda packed: packed[:-20]),
        Mirror(published, lambda packed: b"<html>Sign in</html>"),
    )
    requested = data(tmp_path, "no-address/files", cut.url, page.url, mirrors[2].url)
    files.prepare(requested)
    assert {name: (files.raw_folder(requested) / name).read_bytes() for name in NAMES} == published
    assert len(cut.requests) >= 4
    assert len(page.requests) >= 4
    for server in (cut, page):
        server.shutdown()
        server.server_close()


def test_after_a_mirror_that_never_answers_the_next_is_tried(
    tmp_path: Path,
    published: dict[str, bytes],
    mirrors: list[Mirror],
    data: Callable[..., Data],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "_SILENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait for an accept() that never comes
        requested = data(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}/files", mirrors[2].url)
        raw = files.raw_folder(requested)
        raw.mkdir(parents=True)
        for name in NAMES[1:]:
            (raw / name).write_bytes(published[name])
        files.prepare(requested)
    assert (raw / NAMES[0]).read_bytes() == published[NAMES[0]]
    assert socket.getdefaulttimeout() is None


def test_a_root_that_cannot_be_read(tmp_path: Path, data: Callable[..., Data]) -> None:
    with pytest.raises(UserError, match=r"can't be read \(File name too long\)"):
        files.prepare(data(tmp_path / ("x" * 300)))


def test_without_torchvision_files_can_only_be_copied(
    tmp_path: Path, data: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets.utils", None)
    with pytest.raises(
        UserError, match=r"is missing, and a download needs torchvision; copy the files of fashion_mnis"
    ):
        files.prepare(data(tmp_path, "http://127.0.0.1:9"))
    assert list(tmp_path.iterdir()) == []


def test_only_bad_mirrors_leave_no_bad_file(tmp_path: Path, mirrors: list[Mirror], data: Callable[..., Data]) -> None:
    with pytest.raises(UserError, match=r"HTTP Error 404.*\n.*is not the published one"):
        files.prepare(data(tmp_path, *(m.url for m in mirrors[:2])))
    assert list(tmp_path.iterdir()) == []


def test_one_process_downloads_while_others_wait(
    tmp_path: Path, mirrors: list[Mirror], data: Callable[..., Data]
) -> None:
    failures = []

    files.prepare(data(tmp_path / "alone", mirrors[2].url))
    requests_of_one = len(mirrors[2].requests)
    requested = data(tmp_path / "shared", mirrors[2].url)

    def prepare() -> None:
        try:
            files.prepare(requested)
        except BaseException as error:  # noqa: BLE001  # reported by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(mirrors[2].requests) == 2 * requests_of_one


def test_kmnist_is_verified_packed_when_downloaded_and_unpacked_later(
    tmp_path: Path, published: dict[str, bytes], mirrors: list[Mirror], data: Callable[..., Data]
) -> None:
    requested = data(tmp_path, *(m.url for m in mirrors), name="kmnist")
    files.prepare(requested)
    raw = tmp_path / "KMNIST" / "raw"
    assert {name: (raw / name).read_bytes() for name in NAMES} == published
    assert all(len(mirror.requests) >= 4 for mirror in mirrors)  # the second one's files are not the published ones
    before = len(mirrors[2].requests)
    files.prepare(requested)
    assert len(mirrors[2].requests) == before
    (raw / NAMES[3]).write_bytes(published[NAMES[3]][:-1] + b"\1")
    with pytest.raises(UserError, match=f"{NAMES[3]}: not the recorded file"):
        files.prepare(requested)
    (raw / "SHA256SUMS").unlink()  # without it nothing is known about the files
    files.prepare(requested)
    assert (raw / NAMES[3]).read_bytes() == published[NAMES[3]]


def test_mnist_is_verified(
    tmp_path: Path, published: dict[str, bytes], mirrors: list[Mirror], data: Callable[..., Data]
) -> None:
    files.prepare(data(tmp_path, mirrors[2].url, name="mnist"))
    assert (tmp_path / "MNIST" / "raw" / NAMES[0]).read_bytes() == published[NAMES[0]]


def test_the_files_have_the_names_that_torchvision_expects() -> None:
    assert [name for name, _ in datasets.KMNIST.resources] == [
        f"{name}.gz" for name in files.PUBLISHED_PACKED["kmnist"]
    ]
    assert list(files.PUBLISHED["mnist"]) == list(files.PUBLISHED["fashion_mnist"]) == NAMES


def test_the_published_sums_are_those_that_others_publish_too() -> None:
    # Of KMNIST and CIFAR-10 they were compared with torchvision's repository (its prototype data sets), of MNIST with
    # other projects on GitHub; the installed torchvision has MD5 sums alone. Fashion-MNIST's real files have a test.
    sums = json.dumps([files.PUBLISHED, files.PUBLISHED_PACKED])
    assert hashlib.sha256(sums.encode()).hexdigest() == (
        "89e4beefc720f9ad872629efd30e0a087f9159497a342966c229642d68646fd0"
    )


# The names in batches.meta of the published archive.
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_a_folder_that_lacks_some_classes_needs_empty_ones() -> None:
    message = r"classes are a, c; the network was trained for a, b, c; a folder also needs a folder for each of the"
    with pytest.raises(UserError, match=message):
        files.require_same_classes(["a", "c"], ["a", "b", "c"])
    with pytest.raises(UserError, match=r"classes are a, d; the network was trained for a, b, c$"):
        files.require_same_classes(["a", "d"], ["a", "b", "c"])


def test_a_data_set_knows_its_classes(data: Callable[..., Data]) -> None:
    info = {name: files.describe(data("/", name=name)) for name in get_args(Data.model_fields["name"].annotation)}
    assert (info["cifar10"].channels, info["cifar10"].stored_size) == (3, 32)
    assert list(info.pop("cifar10").class_names) == CIFAR10_CLASSES
    assert {(i.channels, i.stored_size) for i in info.values()} == {(1, 28)}
    assert list(info["fashion_mnist"].class_names) == datasets.FashionMNIST.classes
    assert info["garments"].class_names == info["fashion_mnist"].class_names
    assert list(info["kmnist"].class_names) == datasets.KMNIST.classes
    assert [f"{i} - " for i in info["mnist"].class_names] == [name[:4] for name in datasets.MNIST.classes]


def test_the_garments_are_the_same_in_every_run(data_root: Path, data: Callable[..., Data]) -> None:
    (images, labels), (test_images, test_labels) = (
        files.load(data(data_root, name="garments"), part) for part in ("train", "test")
    )
    assert (images.shape, np.bincount(labels).tolist()) == ((10_000, 28, 28), [1000] * 10)
    assert (test_images.shape, len(test_labels)) == ((2_000, 28, 28), 2_000)
    assert not np.array_equal(images[:2000], test_images)
    for seed, (pixels, classes) in enumerate(((images, labels), (test_images, test_labels)), 1):
        random = np.random.default_rng(seed)
        random.permutation(len(classes))
        assert np.array_equal(garments.garment(int(classes[0]), random), pixels[0])
    # Recorded: what was measured on other machines and in other versions was measured on these.
    found = [hashlib.sha256(values.tobytes()).hexdigest() for values in (test_images, test_labels.astype(np.uint8))]
    assert found == [
        "5467969b3d7adc33189a7eca69243b1576b1b56acc9fbb950ae96088a17e1325",
        "eb556c928d77f815e565e2337a8b53a2487a0405ce9fcea9d3f8a9b258582352",
    ]


@pytest.mark.parametrize(("file", "place"), [("train-images-idx3-ubyte", 5000), ("t10k-labels-idx1-ubyte", 20)])
def test_altered_garments_are_noticed(
    tmp_path: Path, data_root: Path, data: Callable[..., Data], file: str, place: int
) -> None:
    shutil.copytree(data_root / "Garments", tmp_path / "Garments")
    files.prepare(data(tmp_path, name="garments"))
    path = tmp_path / "Garments" / "raw" / file
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{file}: not the recorded file .* remove it and run the command again"):
        files.prepare(data(tmp_path, name="garments"))


def test_garments_without_a_recorded_sum_are_refused(
    tmp_path: Path, data_root: Path, data: Callable[..., Data]
) -> None:
    shutil.copytree(data_root / "Garments", tmp_path / "Garments")
    recorded = tmp_path / "Garments" / "raw" / files.RECORDED
    recorded.write_text("".join(recorded.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=f"{NAMES[0]}: not the recorded file"):
        files.prepare(data(tmp_path, name="garments"))


def test_the_real_files_are_the_published_ones(real_root: Path, data: Callable[..., Data]) -> None:
    real = data(real_root)
    files.prepare(real)
    images, labels = files.load(real, "train")
    assert (images.shape, np.bincount(labels).tolist()) == ((60_000, 28, 28), [6000] * 10)
    assert files.load(real, "test")[0].shape == (10_000, 28, 28)
