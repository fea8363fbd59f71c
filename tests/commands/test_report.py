import io
import shutil
import sys
from pathlib import Path

import pytest

from helpers import put_job
from nin import cli
from nin.sweeps import chart, summary


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for seed, (acc, loss) in enumerate(((0.5, 0.3), (0.7, 0.9))):
        word = f"optimizer.lr=0.{seed + 1}"
        put_job(tmp_path / "lr" / word, [word], acc, metrics={"val/loss": loss, "test/loss": loss})
    return tmp_path / "lr"


@pytest.mark.parametrize(
    ("arguments", "best"),
    [([], "0.2"), (["--metric", "val/loss"], "0.1"), (["--metric=test/acc", "--x=seconds"], "0.2")],
)
def test_the_table_is_printed_and_the_summary_written(
    sweep: Path, arguments: list[str], best: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(summary, "draw", lambda *given: (drawn.append(given), chart.draw(*given))[1])
    assert cli.run("report", [str(sweep), *arguments]) == 0
    metric = next((word.rpartition("=")[2] for word in arguments if "/" in word), "val/acc")
    assert [given[2:] for given in drawn] == [(metric, "seconds" if "--x=seconds" in arguments else "epochs")]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line[0] for line in lines if line and line[0] in ("0.1", "0.2")]
    assert rows == [best, "0.1" if best == "0.2" else "0.2"]
    assert {path.name for path in sweep.iterdir() if path.is_file()} == {
        "summary.csv",
        "summary.md",
        "summary.png",
        "runs.csv",
    }


def test_a_name_whose_characters_no_font_has_is_no_warning(sweep: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert cli.run("report", [str(sweep.rename(sweep.with_name("实验")))]) == 0
    assert [str(warning.message) for warning in recwarn] == []


def test_a_folder_without_jobs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("report", [str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"nin report: {tmp_path}/none: no such folder")
    assert cli.run("report", [str(tmp_path)]) == 2
    assert "no job was started here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_metric_is_refused(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run("report", [str(sweep), "--metric", "acc"])
    assert ended.value.code == 2
    assert "invalid choice: 'acc'" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--metric", "test/acc"], ["--x", "seconds"]])
def test_an_option_that_a_search_has_no_use_for_is_refused(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "search.json").touch()
    assert cli.run("report", [str(tmp_path), *option]) == 2
    assert f"leave {option[0]} out" in capsys.readouterr().err


def test_an_output_encoding_without_all_characters_is_enough(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in list(sweep.iterdir()):  # two seeds have a ±
        shutil.copytree(folder, second := folder.with_name(f"{folder.name},seed=1"))
        (second / ".hydra" / "overrides.yaml").write_text(f"- {folder.name}\n- seed=1\n")
    for encoding in ("ascii", "latin-1"):
        output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "argv", ["nin", "report", str(sweep)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        assert b"0.7000" in output.buffer.getvalue()


def test_the_summary_is_not_written_through_links(sweep: Path, tmp_path: Path) -> None:
    for name in ("summary.csv", ".summary.png.tmp", "summary.png"):
        (sweep / name).symlink_to(tmp_path / "target")
    (tmp_path / "target").write_text("precious")
    assert cli.run("report", [str(sweep)]) == 0
    assert (tmp_path / "target").read_text() == "precious"
    assert not (sweep / "summary.png").is_symlink()
