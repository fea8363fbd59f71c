from pathlib import Path

import numpy as np
import pytest

from nin.runs.folder import RunFolder
from nin.runs.results import print_finished, print_result, print_test


def printed(names: list[str], confusion: np.ndarray, capsys: pytest.CaptureFixture[str]) -> list[str]:
    totals, right = confusion.sum(1), confusion.diagonal()
    by_class = {name: float(r / n) if n else None for name, r, n in zip(names, right, totals, strict=True)}
    print_test({"test/acc": 0.5, "test/loss": 1.0, "test/acc_by_class": by_class}, confusion)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_few_classes_have_a_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(["[red]ants", "bees\nand wasps", "none"], np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), capsys)
    scores = ["test/acc  0.5000", "test/loss 1.0000", "6 test images; lowest accuracy of a class: [red]ants 0.7500"]
    assert lines[:4] == [*scores, "true class (rows), predicted class (columns)"]
    assert [line.split() for line in lines[-4:]] == [
        ["accuracy", "0", "1", "2"],
        ["0", "[red]ants", "0.7500", "3", "1", "·"],
        ["1", "bees\\nand", "wasps", "1.0000", "·", "2", "·"],  # a name is one line, and no markup
        ["2", "none", "-", "·", "·", "·"],
    ]


def test_the_matrix_of_ten_classes_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(["T-shirt/top", *(f"class {i}" for i in range(9))], np.full((10, 10), 1000), capsys)
    assert max(map(len, lines)) <= 80


def test_a_class_that_is_never_predicted_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    confusion = np.array([[30, 0, 0, 0], [20, 0, 0, 0], [19, 0, 0, 0], [1, 0, 0, 29]])
    names = ["shirt", "[red]\ncoat", "of too few images", "hat"]
    assert printed(names, confusion, capsys)[-1] == "never predicted: [red]\\ncoat"
    confusion[3, 1] = 1  # wrongly, but predicted
    assert "never predicted" not in "\n".join(printed(names, confusion, capsys))


def test_of_many_classes_the_worst_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    confusion = np.eye(300, dtype=int) * 2
    confusion[7, 7], confusion[7, 250], confusion[7, 9] = 0, 5, 1
    confusion[299] = 0  # no test image
    lines = printed([f"class {i}" for i in range(300)], confusion, capsys)
    assert "the 30 of 300 classes with the lowest accuracy" in "\n".join(lines)
    rows = [line.split() for line in lines if line.strip().startswith("class ") and "accuracy" not in line]
    assert len(rows) == 30
    assert rows[0] == ["class", "7", "0.0000", "6", "class", "250", "(5)"]
    assert rows[1] == ["class", "0", "1.0000", "2"]
    assert max(map(len, lines)) <= 120


def test_a_finished_job_of_a_sweep_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"metrics": {"test/acc": 0.91, "val/acc": None}, "epochs": 1, "steps": 2, "train_seconds": 1.0}
    result |= {"parameters": 3, "weights_sha256": "x"}
    print_finished(RunFolder(tmp_path), result, " with 2 processes", "seed=0  ", is_job=True)
    assert capsys.readouterr().out == "seed=0  finished before with 2 processes: test/acc 0.9100\n"
    print_finished(RunFolder(tmp_path), result, "", "", is_job=False)
    assert f"{tmp_path.name} is finished; to train again, give nin train another name=…" in capsys.readouterr().out
    print_result(RunFolder(tmp_path), result | {"status": "pruned"}, "seed=0  ")
    assert capsys.readouterr().out.startswith("seed=0  pruned:\n")


def test_the_values_of_a_result_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"test/acc": None, "test/acc_by_class": {"bees": 1.0, "[/b]\n": 0.0, "none": None}}
    result = {"metrics": metrics, "epochs": 1, "steps": 2, "train_seconds": 1.0, "images_per_second": None}
    result |= {"parameters": 3, "weights_sha256": "[/x]", "best_weights_sha256": ":x:", "test_images": 1300}
    print_result(RunFolder(tmp_path), result)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["worst", "class", "[/b]\\n", "0.0000"] in lines
    assert ["test", "images", "1,300"] in lines
    assert ["weights", "[/x]"] in lines
    assert ["best", "weights", ":x:"] in lines
    for other in (None, [], {}, {"a": None}, {"a": "b", "c": 1.0}):  # in a file from elsewhere
        print_result(RunFolder(tmp_path), result | {"metrics": {"test/acc_by_class": other}, "test_images": "b"})
        printed = capsys.readouterr().out
        assert "worst class" not in printed
        assert "test images" not in printed
