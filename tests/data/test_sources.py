"""Every way in which a data set can be broken or missing, each on files of the test's own."""

import gzip
import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from nin.config.composition import compose_config
from nin.config.schema import Data, UserError
from nin.config.validation import validate
from nin.data import idx
from nin.data import sources as files

NAMES = list(files.FASHION_MNIST)


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
    """A small set stands in for the published one, sums and all."""
    contents = small_set()
    for name, content in contents.items():
        monkeypatch.setitem(files.FASHION_MNIST, name, hashlib.sha256(content).hexdigest())
    return contents


def data(root: Path, *mirrors: str) -> Data:
    return validate(compose_config([f"data.root={root}", f"data.mirrors=[{','.join(mirrors)}]"])).data


def put(root: Path, contents: dict[str, bytes]) -> Path:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in contents.items():
        (raw / name).write_bytes(content)
    return raw


def test_whole_files_are_read_and_verified_once(tmp_path: Path, published: dict[str, bytes]) -> None:
    raw = put(tmp_path, published)
    files.prepare(data(tmp_path))
    images, labels = files.load(data(tmp_path), "train")
    assert (images.shape, labels.tolist()) == ((6, 28, 28), [0, 1, 2, 3, 4, 5])
    assert images.tobytes() == published["train-images-idx3-ubyte"][16:]
    seal = (raw / "verified.json").stat().st_mtime_ns
    files.prepare(data(tmp_path))
    assert (raw / "verified.json").stat().st_mtime_ns == seal


@pytest.mark.parametrize("verified_before", [False, True])
def test_one_flipped_byte_is_noticed(tmp_path: Path, published: dict[str, bytes], verified_before: bool) -> None:
    raw = put(tmp_path, published)
    if verified_before:
        files.prepare(data(tmp_path))
    content = bytearray(published[NAMES[0]])
    content[1000] ^= 1
    (raw / NAMES[0]).write_bytes(content)
    with pytest.raises(UserError, match=f"{NAMES[0]}: not the published file .* remove it and say the command again"):
        files.prepare(data(tmp_path))


def test_a_cut_off_file_is_noticed(tmp_path: Path, published: dict[str, bytes]) -> None:
    raw = put(tmp_path, published)
    (raw / NAMES[2]).write_bytes(published[NAMES[2]][:-1])
    with pytest.raises(UserError, match=f"{NAMES[2]}: not the published file"):
        files.prepare(data(tmp_path))


def test_a_missing_file_is_named_with_the_ways_to_bring_it(tmp_path: Path, published: dict[str, bytes]) -> None:
    raw = put(tmp_path, published)
    (raw / NAMES[3]).unlink()
    with pytest.raises(UserError) as told:
        files.prepare(data(tmp_path, "http://127.0.0.1:1/"))
    assert str(told.value).startswith(f"{NAMES[3]} of Fashion-MNIST is not in {raw}")
    for remedy in ("Connection refused", "copy the four unpacked files", "NIN_DATA", "data=garments"):
        assert remedy in str(told.value)


def test_what_could_not_be_fetched_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be downloaded"):
        files.prepare(data(tmp_path / "new" / "root", "http://127.0.0.1:1/"))
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't be written \(Not a directory\).*NIN_DATA"):
        files.prepare(data(tmp_path / "file"))


def test_as_many_labels_as_images(tmp_path: Path) -> None:
    contents = small_set()
    put(tmp_path, contents | {NAMES[1]: contents["t10k-labels-idx1-ubyte"]})
    with pytest.raises(UserError, match="train has 6 images and 4 labels"):
        files.load(data(tmp_path), "train")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not an IDX file of images"),
        (b"\x1f\x8b gzip, still packed", "not an IDX file of images"),
        (small_set()[NAMES[0]][:-1], r"cut off: its header promises 4704 bytes of \(6, 28, 28\), it holds 4703"),
        (small_set()[NAMES[0]] + b"x", "too long"),
    ],
)
def test_a_malformed_idx_file_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: {told}"):
        idx.read_images(path)


class Mirror(ThreadingHTTPServer):
    """Serves gzipped files on loopback and counts what is asked for."""

    def __init__(self, contents: dict[str, bytes], changed: Callable[[bytes], bytes] = lambda packed: packed):
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                content = contents.get(self.path.rsplit("/", 1)[-1].removesuffix(".gz"))
                self.send_response(404 if content is None else 200)
                packed = changed(gzip.compress(content or b""))
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
    tmp_path: Path, published: dict[str, bytes], mirrors: list[Mirror]
) -> None:
    asked = data(tmp_path, *(m.url for m in mirrors))
    files.prepare(asked)
    raw = files.raw_folder(asked)
    assert {name: (raw / name).read_bytes() for name in NAMES} == published
    assert [sorted({path.split("/")[-1].removesuffix(".gz") for path in m.asked}) for m in mirrors] == [
        sorted(NAMES)
    ] * 3
    assert sorted(p.name for p in raw.iterdir()) == sorted([*NAMES, ".lock", "verified.json"])


def test_a_mirror_that_breaks_off_or_is_none_does_not_stand_in_the_way_of_the_next(
    tmp_path: Path, published: dict[str, bytes], mirrors: list[Mirror]
) -> None:
    cut, page = (
        Mirror(published, lambda packed: packed[:-20]),
        Mirror(published, lambda packed: b"<html>Sign in</html>"),
    )
    asked = data(tmp_path, "no-address/files", cut.url, page.url, mirrors[2].url)
    files.prepare(asked)
    assert {name: (files.raw_folder(asked) / name).read_bytes() for name in NAMES} == published
    assert len(cut.asked) >= 4
    assert len(page.asked) >= 4
    for server in (cut, page):
        server.shutdown()
        server.server_close()


def test_a_root_that_cannot_even_be_looked_at_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can't be read \(File name too long\)"):
        files.prepare(data(tmp_path / ("x" * 300)))


def test_only_bad_mirrors_leave_no_bad_file(tmp_path: Path, mirrors: list[Mirror]) -> None:
    with pytest.raises(UserError, match=r"HTTP Error 404.*\n.*is not the published one"):
        files.prepare(data(tmp_path, *(m.url for m in mirrors[:2])))
    assert list(tmp_path.iterdir()) == []


def test_one_downloads_while_others_wait(tmp_path: Path, mirrors: list[Mirror]) -> None:
    failures = []

    files.prepare(data(tmp_path / "alone", mirrors[2].url))
    requests_of_one = len(mirrors[2].asked)
    asked = data(tmp_path / "shared", mirrors[2].url)

    def prepare() -> None:
        try:
            files.prepare(asked)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(mirrors[2].asked) == 2 * requests_of_one


def test_the_garments_are_the_same_everywhere(data_root: Path) -> None:
    raw = data_root / "Garments" / "raw"
    images, labels = idx.read_images(raw / NAMES[0]), idx.read_labels(raw / NAMES[1])
    assert (images.shape, np.bincount(labels).tolist()) == ((10_000, 28, 28), [1000] * 10)
    assert (idx.read_images(raw / NAMES[2]).shape, len(idx.read_labels(raw / NAMES[3]))) == ((2_000, 28, 28), 2_000)
    assert not np.array_equal(images[:2000], idx.read_images(raw / NAMES[2]))


def test_the_real_files_are_the_published_ones(real_root: Path) -> None:
    real = data(real_root)
    files.prepare(real)
    images, labels = files.load(real, "train")
    assert (images.shape, np.bincount(labels).tolist()) == ((60_000, 28, 28), [6000] * 10)
    assert files.load(real, "t10k")[0].shape == (10_000, 28, 28)
