import json
from pathlib import Path

import pytest

from nin import cli


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for seed, (acc, loss) in enumerate(((0.5, 0.3), (0.7, 0.9))):
        folder = tmp_path / "lr" / f"optimizer.lr=0.{seed + 1}"
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text(f"- optimizer.lr=0.{seed + 1}\n")
        metrics = {"val/acc": acc, "val/loss": loss, "test/acc": acc, "test/loss": loss}
        result = {"status": "finished", "metrics": metrics, "train_seconds": 2.0}
        (folder / "result.json").write_text(json.dumps(result))
    return tmp_path / "lr"


@pytest.mark.parametrize(
    ("arguments", "best"),
    [([], "0.2"), (["--metric", "val/loss"], "0.1"), (["--metric=test/acc", "--x=seconds"], "0.2")],
)
def test_the_table_is_printed_and_the_summary_written(
    sweep: Path, arguments: list[str], best: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("report", [str(sweep), *arguments]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line[0] for line in lines if line and line[0] in ("0.1", "0.2")]
    assert rows == [best, "0.1" if best == "0.2" else "0.2"]
    assert {path.name for path in sweep.iterdir() if path.is_file()} == {"summary.csv", "summary.md", "summary.png"}


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
