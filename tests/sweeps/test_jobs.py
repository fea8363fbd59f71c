import csv
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import SMALL, nin
from nin.commands.report import report
from nin.config.composition import compose_config
from nin.config.schema import UserError, project_conf
from nin.config.validation import validate
from nin.runs.folder import RunFolder
from nin.sweeps import jobs as sweep
from nin.sweeps import summary
from nin.training import experiment


def put_job(folder: Path, overrides: list[str], acc: float | None = None, error: str | None = None) -> Path:
    """A job's files as a run leaves them: finished with ``acc``, failed with ``error``, or not ended."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in overrides))
    metrics = {"val/acc": acc, "val/loss": 1.0, "test/acc": acc, "test/loss": 1.0, "test/acc_by_class": {}}
    finished = {"status": "finished", "metrics": metrics, "train_seconds": 2.0}
    if acc is not None or error:
        result: dict[str, Any] = {"status": "failed", "error": error} if error else finished
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_folder_is_named_by_its_overrides_where_they_can_name_one() -> None:
    assert sweep.job_folder("optimizer.lr=0.1,seed=0") == "optimizer.lr=0.1,seed=0"
    assert sweep.job_folder("") == "job"  # not the sweep's own folder, to which others may be added
    awkward = [sweep.job_folder(f"data.root={root}") for root in ("/a/b", "/a b", "a_b", "/a/../b")]
    assert len(set(awkward)) == 4
    assert not any("/" in name for name in awkward)
    long = [sweep.job_folder("x=" + "1" * 300 + end) for end in "ab"]
    assert long[0] != long[1]
    assert {len(name) for name in long} == {100}


def test_seeds_are_folded_and_the_best_comes_first(tmp_path: Path) -> None:
    for lr, accs in (("0.1", (0.8, 0.9)), ("0.05", (0.91, 0.93))):
        for seed, acc in enumerate(accs):
            put_job(tmp_path / f"lr={lr},seed={seed}", ["experiment=cpu", f"optimizer.lr={lr}", f"seed={seed}"], acc)
    put_job(tmp_path / "failed", ["experiment=cpu", "optimizer.lr=9", "seed=0"], error="NonFiniteLossError: nan")
    put_job(tmp_path / "begun", ["experiment=cpu", "optimizer.lr=0.1", "seed=2"])
    jobs = sweep.read_jobs(tmp_path)
    rows = sweep.group_by_seed(jobs, "val/acc")
    assert summary.table(rows, "val/acc") == [
        ["optimizer.lr", "val/acc", "worst", "test/acc", "worst", "seconds", "runs"],
        ["0.05", "0.9200 ± 0.0141", "0.9100", "0.9200 ± 0.0141", "0.9100", "2", "2"],
        ["0.1", "0.8500 ± 0.0707", "0.8000", "0.8500 ± 0.0707", "0.8000", "2", "3 (1 unfinished)"],
        ["9", "", "", "", "", "", "1 (1 failed)"],
    ]
    assert summary.failures(jobs) == ["failed: NonFiniteLossError: nan"]
    report(tmp_path)
    lines = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [float(line["val/acc mean"]) for line in lines[:2]] == pytest.approx([0.92, 0.85])
    assert "| 0.05 | 0.9200 ± 0.0141 |" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_half_written_jobs_do_not_break_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_job(tmp_path / "a", ["seed=0"], 0.5)
    (tmp_path / "empty").mkdir()
    (put_job(tmp_path / "cut", ["seed=1"], 0.5) / "result.json").write_text('{"status": "fin')
    (put_job(tmp_path / "odd", ["seed=2"]) / ".hydra" / "overrides.yaml").write_text("- [")
    report(tmp_path)
    assert {job.folder.name: job.status for job in sweep.read_jobs(tmp_path)} == {"a": "finished", "cut": "unfinished"}


def test_jobs_that_have_not_begun_are_told(tmp_path: Path) -> None:
    asked = ["experiment=cpu", "optimizer.lr=0.1,0.05", "seed=0,1"]
    hydra = {"sweeper": {"params": {"model.norm": "none,batch"}}, "overrides": {"task": asked}}
    (tmp_path / "multirun.yaml").write_text(json.dumps({"hydra": hydra}))
    for norm, lr in (("none", "0.1"), ("batch", "0.05")):
        varied = [f"model.norm={norm}", f"optimizer.lr={lr}", "seed=0"]
        put_job(tmp_path / ",".join(varied), ["experiment=cpu", *varied], 0.5)
    rows = summary.table(sweep.group_by_seed(sweep.read_jobs(tmp_path), "val/acc"), "val/acc")
    assert sorted([row[0], row[1], row[-1]] for row in rows[1:]) == [
        ["batch", "0.05", "2 (1 not begun)"],
        ["batch", "0.1", "2 (2 not begun)"],
        ["none", "0.05", "2 (2 not begun)"],
        ["none", "0.1", "2 (1 not begun)"],
    ]


def own_overrides(sweep: Path, *task: str) -> None:
    """As Hydra's sweeper writes down what it was asked for."""
    (sweep / "multirun.yaml").write_text(json.dumps({"hydra": {"sweeper": {}, "overrides": {"task": list(task)}}}))


def test_a_job_that_was_run_under_two_names_counts_once(tmp_path: Path) -> None:
    for name, overrides, acc in (
        ("job", ["optimizer.lr=0.1"], None),  # it was not finished, and was so under another name
        ("seed=0", ["optimizer.lr=0.1", "seed=0"], 0.9),
        ("optimizer.lr=0.1,seed=0", ["optimizer.lr=0.1", "seed=0"], 0.9),
        ("seed=1", ["name=renamed", "optimizer.lr=0.1", "seed=1"], 0.9),
        ("model.dropout=0.5,optimizer.lr=0.1,seed=1", ["model.dropout=0.5", "optimizer.lr=0.1", "seed=1"], 0.9),
        ("model.dropout=0.3,optimizer.lr=0.1,seed=1", ["model.dropout=0.3", "optimizer.lr=0.1", "seed=1"], 0.8),
    ):
        job = put_job(tmp_path / name, overrides, acc)
        seed = 1 if "seed=1" in overrides else 0
        (job / ".hydra" / "config.yaml").write_text(f"seed: {seed}\nmodel: {{dropout: 0.5}}\noptimizer: {{lr: 0.1}}\n")
    own_overrides(tmp_path, "optimizer.lr=0.1", "seed=0,1")
    rows = sweep.group_by_seed(sweep.read_jobs(tmp_path), "val/acc")
    assert [(row.keys, [job.status for job in row.jobs]) for row in rows] == [
        ({"model.dropout": "0.5"}, ["finished", "finished"]),
        ({"model.dropout": "0.3"}, ["finished"]),
    ]


def test_what_makes_no_other_experiment_makes_no_other_row(tmp_path: Path) -> None:
    for lr, more in (("0.1", []), ("0.05", ["threads=1", "callbacks=none", "trainer=cpu"])):
        for seed in (0, 1):
            varied = [f"optimizer.lr={lr}", f"seed={seed}"]
            put_job(tmp_path / ",".join(varied), [*varied, *more], 0.5)
    own_overrides(tmp_path, "optimizer.lr=0.1,0.05", "seed=0,1", "threads=1")
    rows = sweep.group_by_seed(sweep.read_jobs(tmp_path), "val/acc")
    assert [(row.keys, len(row.jobs)) for row in rows] == [({"optimizer.lr": lr}, 2) for lr in ("0.05", "0.1")]
    # Unless the sweep asks just for that, be it an earlier one.
    for threads in (1, 2):
        put_job(tmp_path / f"optimizer.lr=0.1,threads={threads}", ["optimizer.lr=0.1", f"threads={threads}"], 0.5)
    assert len(sweep.group_by_seed(sweep.read_jobs(tmp_path), "val/acc")) == 4


def test_a_loss_that_ran_away_in_the_last_step_does_not_break_the_report(tmp_path: Path) -> None:
    for seed in (0, 1):
        job = put_job(tmp_path / f"seed={seed}", [f"seed={seed}"], 0.5)
        result = json.loads((job / "result.json").read_text())
        result["metrics"]["test/loss"] = math.nan if seed else 2.0
        (job / "result.json").write_text(json.dumps(result))
    report(tmp_path)
    (line,) = csv.DictReader((tmp_path / "summary.csv").read_text().splitlines())
    assert (line["test/loss mean"], line["test/loss std"], line["val/acc mean"]) == ("2.0", "", "0.5")


def test_a_sweep_that_can_only_be_read_is_reported_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_job(tmp_path / "seed=0", ["seed=0"], 0.5)
    (tmp_path / "summary.csv").mkdir()
    report(tmp_path)
    told = capsys.readouterr()
    assert "0.5000" in told.out
    assert told.err.startswith("no summary: ")


def test_a_job_has_begun_though_the_sweep_was_asked_for_otherwise_since(tmp_path: Path) -> None:
    for lr in ("0.1", "0.05"):
        put_job(tmp_path / f"optimizer.lr={lr}", ["name=lr-11-22", f"optimizer.lr={lr}"], 0.5)
    own_overrides(tmp_path, "name=lr-${now:%m-%d}", "optimizer.lr=0.1,0.05", "threads=1", "callbacks=none")
    assert [job.status for job in sweep.read_jobs(tmp_path)] == ["finished", "finished"]
    own_overrides(tmp_path, "optimizer.lr=0.1,0.01", "threads=1")
    assert [job.status for job in sweep.read_jobs(tmp_path)] == ["finished", "finished", "not begun"]


def test_a_run_that_was_stopped_is_not_at_work(tmp_path: Path) -> None:
    folder = RunFolder(put_job(tmp_path / "seed=0", ["seed=0"]))
    folder.config.write_text("seed: 0")
    with folder.claimed():
        assert [job.status for job in sweep.read_jobs(tmp_path)] == ["running"]
    assert [job.status for job in sweep.read_jobs(tmp_path)] == ["unfinished"]


def test_values_that_can_not_be_tried_one_by_one_are_refused() -> None:
    for values in ("interval(0,1)", "range(0,3,0)"):
        with pytest.raises(UserError, match="not to be tried one by one"):
            sweep.expand_jobs({}, [f"seed={values}"])


def test_what_is_no_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such sweep"):
        sweep.read_jobs(tmp_path / "none")
    with pytest.raises(UserError, match="no job has begun here"):
        sweep.read_jobs(tmp_path)


def test_a_sweep_goes_on_past_a_failure_and_is_not_run_twice(tmp_path: Path, data_root: Path) -> None:
    there = {"cwd": tmp_path, "NIN_DATA": str(data_root)}
    asked = ["train", "-m", *SMALL, "callbacks=none", "name=lr", "schedule=constant", "model.norm=none"]
    first = nin(*asked, "optimizer.lr=1e30,0.001", "seed=0,1", **there)
    assert first.returncode == 1, first.stderr
    folder = tmp_path / "outputs" / "sweeps" / "lr"
    results = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/result.json")}
    assert {name: result["status"] for name, result in results.items()} == {
        f"optimizer.lr={lr},seed={seed}": status
        for lr, status in (("1e+30", "failed"), ("0.001", "finished"))
        for seed in (0, 1)
    }
    error = results["optimizer.lr=1e+30,seed=1"]["error"]
    assert error.startswith("NonFiniteLossError: the loss is")
    for text in (first.stderr, (folder / "optimizer.lr=1e+30,seed=1" / "nin.log").read_text()):
        assert "Traceback" in text
        assert error.partition(": ")[2] in text
    assert "failed: optimizer.lr=1e+30,seed=0: NonFiniteLossError" in first.stdout

    # The same job alone, in a process that did other things, is the same job.
    small = [*SMALL, "callbacks=none", *asked[-2:], "optimizer.lr=0.001", "seed=1", f"data.root={data_root}"]
    alone = experiment.train(validate(compose_config(small)), RunFolder(tmp_path / "alone"), [])
    assert results["optimizer.lr=0.001,seed=1"]["weights_sha256"] == alone["weights_sha256"]

    # Said again, what is finished is left alone, and a value more is a job more.
    done = [p for seed in (0, 1) for p in (folder / f"optimizer.lr=0.001,seed={seed}").rglob("*")]
    times = {p: p.stat().st_mtime_ns for p in done}
    time.sleep(0.01)
    wider = nin(*asked, "optimizer.lr=0.001,0.002", "seed=0,1", **there)
    assert wider.returncode == 0, wider.stderr
    assert {p: p.stat().st_mtime_ns for p in done} == times
    assert (folder / "optimizer.lr=0.002,seed=1" / "result.json").exists()

    # A mistake in any job is found before the first begins; another fixed setting is refused by name.
    mistaken = nin(*asked, "optimizer.lr=0.003,-1", "data.image_size=28,3", **there)
    assert mistaken.returncode == 2
    assert mistaken.stderr.startswith("nin train: 2 errors\n  data.image_size=3: nin needs at least")
    assert not list(folder.glob("optimizer.lr=0.003*"))
    other = nin(*asked, "optimizer.lr=0.001,0.002", "seed=0,1", "model.dropout=0.3", **there)
    assert other.returncode == 1
    assert "optimizer.lr=0.001,seed=0 belongs to another experiment" in other.stderr.replace("\n", "")


def test_a_value_on_the_command_line_replaces_the_sweep_files() -> None:
    params = {"model.conv1x1_layers": "0,1", "seed": "0,1"}
    assert sweep.expand_jobs(params, ["experiment=cpu"]) == [
        [f"model.conv1x1_layers={layers}", f"seed={seed}", "experiment=cpu"] for layers in (0, 1) for seed in (0, 1)
    ]
    assert sweep.expand_jobs(params, ["seed=7"]) == [[f"model.conv1x1_layers={n}", "seed=7"] for n in (0, 1)]
    assert sweep.without_overridden(params, ["seed=7"]) == {"model.conv1x1_layers": "0,1"}


@pytest.mark.parametrize("path", sorted((project_conf() / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_sweep_is_sound_in_its_first_and_last_job(path: Path) -> None:
    params = yaml.safe_load(path.read_text().partition("\n\n")[0])["hydra"]["sweeper"]["params"]
    on_a_cpu = ["experiment=cpu", *(["data.image_size=67"] if path.stem == "networks" else [])]
    for task in ([], on_a_cpu):
        jobs = sweep.expand_jobs(params, task)
        assert len(jobs) > 2
        for job in (jobs[0], jobs[-1]):
            assert validate(compose_config(job)).seed == (0 if job is jobs[0] else 2)


@pytest.mark.parametrize("path", sorted((project_conf() / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_is_sound_and_says_what_to_expect(path: Path) -> None:
    settings = validate(compose_config([f"experiment={path.stem}"]))
    header = path.read_text().partition("\ndefaults:")[0].partition("\ndata:")[0]
    assert f"experiment={path.stem}" in header
    assert "test/acc" in header or "nmeasured" in header
    if settings.model.name == "nin":
        assert settings.model.head == "gap"  # no fully connected layer
