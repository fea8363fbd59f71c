"""`nin predict`: images in, a table, JSON or CSV out, and pictures of the score maps."""

import csv
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nin
from nin.commands.predict import _MapNames, _print_csv, _print_json, _print_table, main
from nin.config.schema import UserError
from nin.deploy import map_figures
from nin.deploy.trained import Description, Scores, TrainedNetwork


@pytest.fixture
def pictures(tmp_path: Path, test_images: np.ndarray) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(test_images[i]).save(folder / f"{i}.png")
    return folder


def test_json_has_every_class_and_names_broken_files(
    run_folder: Path, pictures: Path, test_images: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    (pictures / "1b.png").write_text("<html>")
    assert main([str(run_folder), str(pictures), "--json"]) == 1
    out, err = capfd.readouterr()
    rows = json.loads(out)
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "1b.png", "2.png"]
    assert rows[2]["error"] == "not an image in a format that Pillow can read"
    assert f"nin predict: {pictures}/1b.png: not an image" in err
    assert "nin predict: 1 of 4 could not be read" in err
    network = nin.load(run_folder)
    for row, probabilities in zip([rows[0], rows[1], rows[3]], network.predict(test_images[:3]), strict=True):
        assert list(row["probabilities"]) == network.description.class_names
        assert list(row["probabilities"].values()) == pytest.approx(probabilities.tolist(), abs=1e-6)
        assert row["class"] == network.description.class_names[int(probabilities.argmax())]


def test_what_is_left_out_is_named(run_folder: Path, pictures: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("a.heic", "b", "c.txt", "d.md"):
        (pictures / name).write_text("no image")
    assert main([str(run_folder), str(pictures)]) == 0
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 4
    names = ", ".join(f"{pictures}/{name}" for name in ("a.heic", "b", "c.txt"))
    assert err.splitlines()[-1] == f"nin predict: files without the suffix of an image are left out: {names} and 1 more"
    (pictures / "empty").mkdir()
    assert main([str(run_folder), str(pictures / "0.png"), str(pictures / "empty")]) == 1
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 2
    assert err.splitlines()[-1] == f"nin predict: {pictures}/empty: no images there"
    (pictures / "empty" / "a.heic").touch()
    left_out = "files without the suffix of an image are left out: .*/empty/a.heic$"
    with pytest.raises(UserError, match=rf"/empty: no images there; {left_out}"):
        main([str(run_folder), str(pictures / "empty")])


def test_csv_and_table(run_folder: Path, pictures: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_folder), str(pictures / "0.png"), "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capfd.readouterr().out))
    assert float(row["probability"]) == max(float(row[name]) for name in nin.load(run_folder).description.class_names)
    assert main([str(run_folder), str(pictures / "0.png"), "--top", "2"]) == 0
    header, line = capfd.readouterr().out.splitlines()
    assert header.split() == ["image", "class", "2."]
    assert f"{row['class']} {float(row['probability']):.4f}" in line


@pytest.mark.parametrize(("kind", "first"), [("--json", '"犬"'), ("--csv", "image,class,probability,犬,猫")])
def test_class_names_stay_distinct_in_an_encoding_that_lacks_their_characters(
    kind: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for encoding in ("utf-8", "ascii"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="replace"))
        names = ("a.png", os.fsdecode(b"b\xff.png"), os.fsdecode(b"b\xfe.png"))
        print_rows = _print_json if kind == "--json" else _print_csv
        print_rows(((name, np.array([0.25, 0.75]), "") for name in names), ["犬", "猫"])
        sys.stdout.flush()
        text = written.getvalue().decode()
        assert (first in text) == (encoding == "utf-8")
        if kind == "--json":
            rows = json.loads(text)
            assert [row["image"] for row in rows] == ["a.png", "b\udcff.png", "b\udcfe.png"]
            assert all(row["probabilities"] == {"犬": 0.25, "猫": 0.75} for row in rows)
        else:
            header, *lines = text.splitlines()
            assert encoding == "utf-8" or header == "image,class,probability,\\u72ac,\\u732b"
            assert [line.partition(",")[0] for line in lines] == ["a.png", "b\\udcff.png", "b\\udcfe.png"]


def test_the_table_prints_escapes_in_class_names_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    _print_table(iter([("a.png", np.array([0.75, 0.25]), "")]), ["\x1b[2Jcoat", "hat"], 1)
    assert capsys.readouterr().out == "image  class\na.png  \\x1b[2Jcoat 0.7500\n"


def test_on_a_terminal_a_long_name_leaves_room_for_the_classes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(name: str) -> list[str]:
        _print_table(iter([(name, np.array([0.75, 0.25]), "")]), ["coat", "hat"], 2)
        return capsys.readouterr().out.splitlines()

    monkeypatch.setenv("COLUMNS", "48")  # 22 for the name
    name = "photos/of/服/shirt_0001.png"
    assert lines(name)[1] == f"{name}  coat 0.7500  hat 0.2500"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert lines(name)[1] == "…/of/服/shirt_0001.png  coat 0.7500  hat 0.2500"
    assert lines("shirt.png")[1] == "shirt.png  coat 0.7500  hat 0.2500"
    monkeypatch.setenv("COLUMNS", "10")
    assert lines(name)[1] == "…f/服/shirt_0001.png  coat 0.7500  hat 0.2500"


def test_a_long_table_has_one_header_and_ends_with_its_reader(export: Path, data_root: Path) -> None:
    """The columns stay where they are over all windows, and ``nin predict … | head`` is no error."""
    idx = data_root / "Garments" / "raw" / "t10k-images-idx3-ubyte"
    command = [sys.executable, "-m", "nin", "predict", str(export), str(idx)]
    whole = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = whole.stdout.splitlines()
    assert (whole.returncode, len(lines), whole.stdout.count("image  ")) == (0, 2001, 1)
    assert {line.index("]  ") for line in lines[1001:]} == {len(f"{idx}[1000]") - 1}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().split() == ["image", "class", "2.", "3."]
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


def test_json_goes_to_a_file_while_the_bar_is_on_a_terminal(export: Path, pictures: Path) -> None:
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-m", "nin", "predict", str(export), str(pictures), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
        os.close(stderr)
        out, _ = process.communicate(timeout=120)
    assert len(json.loads(out)) == 3
    assert b" images" in os.read(terminal, 10_000)
    os.close(terminal)


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-"])
def test_a_closed_stream_is_no_error(export: Path, pictures: Path, closed: str) -> None:
    command = [sys.executable, "-m", "nin", "predict", str(export), str(pictures), "--csv"]
    run = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], capture_output=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.count(b"\n") == (0 if ">&-" in closed.split() else 4)


def test_an_idx_file_and_standard_input(
    export: Path,
    data_root: Path,
    pictures: Path,
    test_images: np.ndarray,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idx = data_root / "Garments" / "raw" / "t10k-images-idx3-ubyte"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((pictures / "1.png").read_bytes())))
    assert main([str(export), str(idx), "-", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert len(rows) == 2001
    assert rows[2000]["image"] == "-"
    assert rows[2000]["probabilities"] == pytest.approx(rows[1]["probabilities"], abs=1e-6)
    assert rows[1]["image"] == f"{idx}[1]"
    found = np.array([list(row["probabilities"].values()) for row in rows[:2000]])
    np.testing.assert_allclose(found, nin.load(export).predict(test_images), atol=1e-6)


def test_images_are_brought_to_the_form_of_the_network_and_inverted_before_they_are_padded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = []

    def compute(images: np.ndarray, maps: bool) -> Scores:
        received.extend(images)
        return Scores(np.ones((len(images), 1), np.float32), np.ones((len(images), 1), np.float32))

    known = Description(["a"], 1, 28, 28, False, "gap", {"data": {}}, fit="pad")
    monkeypatch.setattr("nin.deploy.loading.load", lambda path, allow: TrainedNetwork(known, compute))
    Image.new("L", (84, 28), 200).save(tmp_path / "wide.png")
    assert main([str(tmp_path), str(tmp_path / "wide.png"), "--invert"]) == 0
    (image,) = received
    assert [row.tolist() for row in image[[0, 13, 27]]] == [[0] * 28, [55] * 28, [0] * 28]


def test_a_light_ground_is_noticed_and_inverted(
    export: Path, tmp_path: Path, test_images: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(255 - test_images[5]).save(tmp_path / "light.png")
    Image.fromarray(test_images[5]).save(tmp_path / "dark.png")
    (broken := tmp_path / "\x1b[31mbroken.png").touch()
    assert main([str(export), str(tmp_path / "light.png"), str(broken), "--json"]) == 1
    printed = capfd.readouterr().err
    assert "images with a light border: 1 of 1; the" in printed.replace("\n", " ")
    assert "\\x1b[31mbroken.png: " in printed
    assert "\x1b" not in printed
    assert main([str(export), str(tmp_path / "light.png"), "--json", "--invert"]) == 0
    inverted = capfd.readouterr()
    assert inverted.err == ""
    assert main([str(export), str(tmp_path / "dark.png"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["probabilities"] == json.loads(inverted.out)[0]["probabilities"]


@pytest.mark.parametrize(
    ("data", "is_hinted"),
    [({"name": "kmnist"}, True), ({"name": "cifar10"}, False), ({"name": "folder"}, False), ({}, False)],
)
def test_a_light_ground_is_noticed_by_networks_of_light_objects_on_dark_alone(
    data: dict[str, str],
    is_hinted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    known, scores = Description(["a"], 1, 28, 28, False, "gap", {"data": data}), np.ones((1, 1), np.float32)
    network = TrainedNetwork(known, lambda images, maps: Scores(scores, scores))
    monkeypatch.setattr("nin.deploy.loading.load", lambda path, allow: network)
    Image.new("L", (28, 28), 255).save(tmp_path / "light.png")
    assert main([str(tmp_path), str(tmp_path / "light.png")]) == 0
    assert ("images with a light border: 1 of 1; the" in capfd.readouterr().err) == is_hinted


def test_maps_are_pictures_named_after_the_images(
    run_folder: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(pictures / "0.png", pictures / "0.bmp.png")
    maps = tmp_path / "maps"
    assert main([str(run_folder), str(pictures / "0.png"), str(pictures / "0.png"), "--maps", str(maps)]) == 0
    stem = str(pictures / "0").strip("/").replace("/", "_")
    assert sorted(file.name for file in maps.iterdir()) == [f"{stem}-2.png", f"{stem}.png"]
    assert f"score maps: {maps}, a picture of each image\n" in capfd.readouterr().err
    with Image.open(maps / f"{stem}.png") as picture:
        values = np.asarray(picture.convert("RGB")).astype(int)
    assert values.shape[1] > 2 * values.shape[0]
    assert (abs(values[..., 0] - values[..., 2]) > 40).sum() > 500  # red or blue is drawn over the gray image


def test_a_picture_that_can_not_be_written_is_named(
    run_folder: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(map_figures, "open_atomically", refuse)
    with pytest.raises(UserError, match=r"^--maps \S+/maps: can't be written \(No space left on device\)$"):
        main([str(run_folder), str(pictures / "0.png"), "--maps", str(tmp_path / "maps")])
    (tmp_path / "file").touch()
    for place in ("file", "file/maps"):
        with pytest.raises(UserError, match=rf"^--maps \S+/{place}: can't be written \(\S+/file is not a folder\)$"):
            main([str(run_folder), str(pictures / "0.png"), "--json", "--maps", str(tmp_path / place)])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"^--maps \S+/new/maps: can't be written \(no permission to write to \S+\)$"):
        main([str(run_folder), str(pictures / "0.png"), "--json", "--maps", str(tmp_path / "new" / "maps")])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("image", "maps"), [("0.png", "."), (".", "."), (".", "maps"), ("0.png", "../pictures")])
def test_maps_are_not_written_among_the_images(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, maps: str
) -> None:
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path / "pictures")
    Image.new("L", (28, 28)).save("0.png")
    content = Path("0.png").read_bytes()
    with pytest.raises(UserError, match=rf"^--maps {re.escape(maps)}: has the images of {re.escape(image)}, or is in"):
        main([str(run_folder), image, "--maps", maps])
    assert [path.read_bytes() for path in tmp_path.rglob("*.*")] == [content]


def test_names_of_maps_have_the_index_in_an_idx_file_and_fit_a_file_system(tmp_path: Path) -> None:
    names = _MapNames(tmp_path)
    assert [names.next(f"x.idx[{i}]").name for i in range(2)] == ["x.idx_0.png", "x.idx_1.png"]
    path = names.next("/".join(["名" * 60] * 4) + ".png")
    assert path.name == "名" * 6 + "_" + "名" * 60 + ".png"  # 3 bytes each
    path.with_name(f".{path.name}.tmp").write_bytes(b"")  # as a picture is written, under a temporary name first


def test_a_missing_network_and_missing_images_are_reported_together() -> None:
    with pytest.raises(UserError, match=r"^no/run, no/shirt.png: no such file or folder$"):
        main(["no/run", "no/shirt.png"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png: no such file or folder"),
        ([".", "--top", "0"], "--top 0: must be 1 or more"),
        (["."], ".: no images there"),
    ],
)
def test_mistakes(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main([str(run_folder), *arguments])
