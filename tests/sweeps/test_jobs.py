import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest
import yaml

from helpers import SMALL, merge, put_job, read_results, run_experiment
from nin import cli
from nin.config.composition import compose_config, parse_overrides
from nin.config.schema import CONF, UserError
from nin.config.validation import validate
from nin.runs.folder import RunFolder
from nin.sweeps import jobs as sweep
from nin.sweeps import summary
from nin.sweeps.rows import group_by_seed
from nin.sweeps.stored import is_running


def test_a_folder_is_named_by_its_overrides_where_they_can_name_one() -> None:
    assert sweep.job_folder("optimizer.lr=0.1,seed=0") == "optimizer.lr=0.1,seed=0"
    assert sweep.job_folder("") == "job"  # not the sweep's own folder, to which others may be added
    awkward = [sweep.job_folder(f"data.root={root}") for root in ("/a/b", "/a b", "a_b", "/a/../b")]
    assert len(set(awkward)) == 4
    assert not any("/" in name for name in awkward)
    long = [sweep.job_folder("x=" + "1" * 300 + end) for end in "ab"]
    assert long[0] != long[1]
    assert {len(name) for name in long} == {100}
    assert len(sweep.job_folder("x=" + "图" * 100).encode()) <= 100  # file systems allow 255 bytes


def test_jobs_that_have_not_started_are_listed(tmp_path: Path) -> None:
    write_request(tmp_path, "model.norm=none,batch", "experiment=cpu", "optimizer.lr=0.1,0.05", "seed=0,1")
    for norm, lr in (("none", "0.1"), ("batch", "0.05")):
        varied = [f"model.norm={norm}", f"optimizer.lr={lr}", "seed=0"]
        put_job(tmp_path / ",".join(varied), ["experiment=cpu", *varied], 0.5)
    rows = summary.tabulate(group_by_seed(sweep.read_jobs(tmp_path), "val/acc"), "val/acc")
    assert sorted([row[0], row[1], row[-1]] for row in rows[1:]) == [
        ["batch", "0.05", "2 (1 not started)"],
        ["batch", "0.1", "2 (2 not started)"],
        ["none", "0.05", "2 (2 not started)"],
        ["none", "0.1", "2 (1 not started)"],
    ]


def write_request(folder: Path, *task: str) -> None:
    """Writes the jobs of a command with these overrides."""
    overrides = parse_overrides(list(task))
    jobs, swept = sweep.expand_jobs(overrides), [sweep.key_of(o) for o in overrides if o.is_sweep_override()]
    sweep.write_requested_jobs(folder, swept, dict(zip(sweep.folder_names(jobs, swept), jobs, strict=True)))


def test_a_job_with_two_folders_counts_once(tmp_path: Path) -> None:
    for name, overrides, acc in (
        ("job", ["optimizer.lr=0.1"], None),  # unfinished here, finished in another folder
        ("seed=0", ["optimizer.lr=0.1", "seed=0"], 0.9),
        ("optimizer.lr=0.1,seed=0", ["optimizer.lr=0.1", "seed=0"], 0.9),
        ("seed=1", ["name=renamed", "optimizer.lr=0.1", "seed=1"], 0.9),
        ("model.dropout=0.5,optimizer.lr=0.1,seed=1", ["model.dropout=0.5", "optimizer.lr=0.1", "seed=1"], 0.9),
        ("model.dropout=0.3,optimizer.lr=0.1,seed=1", ["model.dropout=0.3", "optimizer.lr=0.1", "seed=1"], 0.8),
    ):
        seed = 1 if "seed=1" in overrides else 0
        put_job(tmp_path / name, overrides, acc, f"seed: {seed}\nmodel: {{dropout: 0.5}}\noptimizer: {{lr: 0.1}}\n")
    write_request(tmp_path, "optimizer.lr=0.1", "seed=0,1")
    rows = group_by_seed(sweep.read_jobs(tmp_path), "val/acc")
    assert [(row.keys, [job.status for job in row.jobs]) for row in rows] == [
        ({"model.dropout": "0.5"}, ["finished", "finished"]),
        ({"model.dropout": "0.3"}, ["finished"]),
    ]


@pytest.mark.parametrize(
    ("key", "default", "other", "config"),
    [
        ("trainer.gradient_clip_val", "null", "1.5", "trainer: {gradient_clip_val: %s}"),
        ("model.widths", "[48,128]", "[64,160]", "model: {widths: %s}"),
        ("model.norm", "none", "batch", "model: {norm: %s}"),
        ("optimizer", "sgd", "adamw", "optimizer: {name: %s, lr: 0.1}"),
    ],
)
def test_a_key_that_is_varied_only_now_has_its_default_in_earlier_jobs(
    tmp_path: Path, key: str, default: str, other: str, config: str
) -> None:
    for seed in (0, 1):
        put_job(tmp_path / f"seed={seed}", [f"seed={seed}"], 0.9, f"seed: {seed}\n{config % default}\n")
    for value, acc in ((default, 0.9), (other, 0.8)):
        put_job(tmp_path / sweep.job_folder(f"{key}={value}"), [f"{key}={value}"], acc, f"seed: 0\n{config % value}\n")
    write_request(tmp_path, f"{key}={default},{other}")
    assert keys_and_counts(tmp_path) == [({key: default}, 2), ({key: other}, 1)]


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        ("0", "0.0"),
        ("1e-3", "0.001"),
        ("True", "true"),
        ("[0.0,1]", "[0.0, 1]"),
        ("[0,1]", "[0.0, 1]"),
        ('"a b"', "a b"),
        (r"'it\'s'", "it's"),
        ("['a',\"b\"]", "[a, b]"),
    ],
)
def test_a_value_is_the_same_however_it_was_typed(typed: str, stored: str, tmp_path: Path) -> None:
    config = f"seed: %d\noptimizer: {{x: {stored}}}\n"
    put_job(tmp_path / f"optimizer.x={typed},seed=0", [f"optimizer.x={typed}", "seed=0"], 0.9, config % 0)
    for seed in (0, 1):
        put_job(tmp_path / f"seed={seed}", [f"seed={seed}"], 0.9, config % seed)
    write_request(tmp_path, "seed=0,1")
    (row,) = group_by_seed(sweep.read_jobs(tmp_path), "val/acc")
    assert len(row.jobs) == 2


def test_one_batch_and_all_batches_are_two_rows(tmp_path: Path) -> None:
    for limit in ("1", "1.0"):
        word, config = f"trainer.limit_test_batches={limit}", f"trainer: {{limit_test_batches: {limit}}}\n"
        put_job(tmp_path / word, [word], 0.9, config)
    write_request(tmp_path, "trainer.limit_test_batches=1,1.0")
    assert [row.keys for row in group_by_seed(sweep.read_jobs(tmp_path), "val/acc")] == [
        {"trainer.limit_test_batches": "1"},
        {"trainer.limit_test_batches": "1.0"},
    ]


def test_a_folder_of_images_is_one_value_however_its_path_was_typed(tmp_path: Path) -> None:
    config = "seed: %d\ndata: {name: folder, root: /photos/a}\n"
    put_job(tmp_path / "data.root=a", ["data.root=a"], 0.9, config % 0)
    put_job(tmp_path / "data.root=b", ["data.root=b"], 0.8, "seed: 0\ndata: {name: folder, root: /photos/b}\n")
    for seed in (0, 1):
        put_job(tmp_path / f"seed={seed}", ["data.root=../photos/a", f"seed={seed}"], 0.9, config % seed)
    write_request(tmp_path, "data.root=../photos/a", "seed=0,1")
    assert sorted(keys_and_counts(tmp_path), key=str) == [
        ({"data.root": "/photos/a"}, 2),
        ({"data.root": "/photos/b"}, 1),
    ]


def test_networks_of_the_same_class_are_not_the_same_option(tmp_path: Path) -> None:
    put_job(tmp_path / "seed=0", ["experiment=nin_small", "seed=0"], 0.9, "seed: 0\nmodel: {name: nin}\n")
    for model in ("nin", "lenet"):
        words = ["experiment=nin_small", f"model={model}", "seed=0"]
        put_job(tmp_path / f"model={model}", words, 0.8, f"seed: 0\nmodel: {{name: {model}}}\n")
    write_request(tmp_path, "experiment=nin_small", "model=nin,lenet", "seed=0")
    assert sorted(count for _, count in keys_and_counts(tmp_path)) == [1, 1, 1]


def test_a_job_that_has_not_started_is_in_the_row_of_its_command_after_another_key_was_varied(tmp_path: Path) -> None:
    for lr, acc in (("0.01", 0.9), ("0.005", 0.8)):
        config = f"seed: 0\noptimizer: {{lr: {lr}}}\n"
        put_job(tmp_path / f"optimizer.lr={lr}", [f"optimizer.lr={lr}"], acc, config)
    put_job(tmp_path / "seed=0", ["seed=0"], 0.9, "seed: 0\noptimizer: {lr: 0.01}\n")
    write_request(tmp_path, "seed=0,1,2")
    assert keys_and_counts(tmp_path) == [({"optimizer.lr": "0.01"}, 3), ({"optimizer.lr": "0.005"}, 1)]


def test_overrides_that_do_not_change_the_experiment_make_no_other_row(tmp_path: Path) -> None:
    for lr, more in (("0.1", []), ("0.05", ["threads=1", "callbacks=none", "trainer=cpu"])):
        for seed in (0, 1):
            varied = [f"optimizer.lr={lr}", f"seed={seed}"]
            put_job(tmp_path / ",".join(varied), [*varied, *more], 0.5)
    write_request(tmp_path, "optimizer.lr=0.1,0.05", "seed=0,1", "threads=1")
    rows = group_by_seed(sweep.read_jobs(tmp_path), "val/acc")
    assert [(row.keys, len(row.jobs)) for row in rows] == [({"optimizer.lr": lr}, 2) for lr in ("0.05", "0.1")]
    # Unless that is what the sweep varies, even if it is an earlier one.
    for threads in (1, 2):
        put_job(tmp_path / f"optimizer.lr=0.1,threads={threads}", ["optimizer.lr=0.1", f"threads={threads}"], 0.5)
    assert len(group_by_seed(sweep.read_jobs(tmp_path), "val/acc")) == 4


def keys_and_counts(folder: Path) -> list[tuple[dict[str, str], int]]:
    return [(row.keys, len(row.jobs)) for row in group_by_seed(sweep.read_jobs(folder), "val/acc")]


def test_runs_of_different_lengths_are_not_seeds_of_one_setting(tmp_path: Path) -> None:
    # `nin train -m … seed=0,1` with one epoch, then seed=2,3 with two, of which seed 3 has them from its experiment.
    for seed, given, epochs in ((0, "1", 1), (1, "1", 1), (2, "2", 2), (3, None, 2)):
        words = [f"trainer.max_epochs={given}"] if given else []
        config = f"trainer: {{max_epochs: {epochs}}}\ncallbacks: {{}}\n"
        put_job(tmp_path / f"seed={seed}", [*words, f"seed={seed}"], epochs / 10, config)
    write_request(tmp_path, "trainer.max_epochs=2", "seed=2,3,4")
    assert keys_and_counts(tmp_path) == [({"trainer.max_epochs": "2"}, 3), ({"trainer.max_epochs": "1"}, 2)]
    header = summary.tabulate(group_by_seed(sweep.read_jobs(tmp_path), "val/acc"), "val/acc")[0]
    assert header[0] == "trainer.max_epochs"
    # Extended to two epochs, as by nin resume, they are seeds of one setting again: the last value counts.
    for seed in (0, 1):
        hydra = tmp_path / f"seed={seed}" / ".hydra"
        hydra.joinpath("overrides.yaml").write_text(f"[trainer.max_epochs=1, seed={seed}, trainer.max_epochs=2]")
        hydra.joinpath("config.yaml").write_text("trainer: {max_epochs: 2}\ncallbacks: {}\n")
    assert keys_and_counts(tmp_path) == [({}, 5)]


def test_other_callbacks_and_other_images_make_another_row(tmp_path: Path) -> None:
    observers = "images: {_target_: nin.training.callbacks.tensorboard.ImageLogger}"
    average = f"{observers}, ema: {{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: %s}}"
    for seed, acc, callbacks in ((0, 0.1, observers), (1, 0.1, ""), (2, 0.2, average % 0.9), (3, 0.3, average % 0.99)):
        put_job(tmp_path / "c" / f"seed={seed}", [f"seed={seed}"], acc, f"callbacks: {{{callbacks}}}\n")
    assert keys_and_counts(tmp_path / "c") == [
        ({"callbacks": "ema", "callbacks.ema.decay": "0.99"}, 1),
        ({"callbacks": "ema", "callbacks.ema.decay": "0.9"}, 1),
        ({"callbacks": "", "callbacks.ema.decay": ""}, 2),
    ]
    for seed, name, root in (
        (0, "folder", "/cats"),
        (1, "folder", "/dogs"),
        (2, "garments", "/a"),
        (3, "garments", "/b"),
    ):
        config = f"data: {{name: {name}, root: {root}}}\n"
        put_job(tmp_path / name / f"seed={seed}", [f"seed={seed}"], seed / 10, config)
    assert keys_and_counts(tmp_path / "folder") == [({"data.root": "/dogs"}, 1), ({"data.root": "/cats"}, 1)]
    assert keys_and_counts(tmp_path / "garments") == [({}, 2)]  # the same images, wherever they are stored


def test_a_job_counts_as_started_though_the_sweep_was_started_again_with_other_overrides(tmp_path: Path) -> None:
    for lr in ("0.1", "0.05"):
        put_job(tmp_path / f"optimizer.lr={lr}", ["name=lr-11-22", f"optimizer.lr={lr}"], 0.5)
    write_request(tmp_path, "name=lr-${now:%m-%d}", "optimizer.lr=0.1,0.05", "threads=1", "callbacks=none")
    assert [job.status for job in sweep.read_jobs(tmp_path)] == ["finished", "finished"]
    write_request(tmp_path, "optimizer.lr=0.1,0.01", "threads=1")
    assert [job.status for job in sweep.read_jobs(tmp_path)] == ["finished", "finished", "not started"]


def test_a_stopped_run_is_unfinished(tmp_path: Path) -> None:
    folder = RunFolder(put_job(tmp_path / "seed=0", ["seed=0"]))
    folder.config.write_text("seed: 0")
    with folder.claim():
        assert [job.status for job in sweep.read_jobs(tmp_path)] == ["running"]
    assert [job.status for job in sweep.read_jobs(tmp_path)] == ["unfinished"]


def test_values_that_can_not_be_enumerated_are_refused() -> None:
    for values, message in (
        ("interval(0,1)", "an interval is for a search"),
        ("range(0,3,0)", "can't be enumerated .*must not be zero"),
        ("range(0,1,0.0)", "can't be enumerated .*step:0"),
        ("range(0,nan)", "can't be enumerated"),
        ("range(0,-5)", r"^seed=range\(0,-5\): has no values, so there are no jobs$"),
    ):
        with pytest.raises(UserError, match=message):
            sweep.expand_jobs(parse_overrides(["optimizer.lr=0.1,0.2", "compile=false", f"seed={values}"]))


@pytest.mark.parametrize(
    "task",
    [
        ["seed=range(1000000000)"],
        ["seed=shuffle(range(1000000000))"],
        ["seed=range(0,inf)"],
        ["seed=range(200)", "optimizer.lr=range(0.1,1.1,0.01)"],
        ["seed=range(10001,0,-1)"],
        ["seed=range(5000)", "model.head=gap,fc,mlp"],
    ],
)
def test_too_many_jobs_are_refused_before_they_are_listed(task: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        sweep.expand_jobs(parse_overrides(task))
    assert str(refused.value) == f"{' '.join(task)}: a sweep has at most 10,000 jobs; vary fewer values"


def test_a_range_may_be_as_long_as_the_limit() -> None:
    assert len(sweep.expand_jobs(parse_overrides(["seed=range(5000)", "model.norm=none,batch"]))) == 10_000


@pytest.mark.parametrize("content", ["{}", "[]", "5", "null", '"finished"', '{"status": "finished"}',
                                     '{"status": "finished", "metrics": 5}', '{"status": 5}', '{"sta'])  # fmt: skip
def test_a_result_with_other_content_is_none(tmp_path: Path, content: str) -> None:
    job = put_job(tmp_path / "seed=0", ["seed=0"], 0.5)
    (job / "result.json").write_text(content)
    (job / "metrics.csv").write_text("epoch,val/acc\n1,0.25\n")
    (found,) = sweep.read_jobs(tmp_path)
    assert (found.status, found.metrics) == ("unfinished", {"val/acc": 0.25})


@pytest.mark.parametrize("content", ["{}", "5", "- 5", "- [", "- a: 1", "text", "\x00"])
def test_a_folder_whose_overrides_are_something_else_is_no_job(tmp_path: Path, content: str) -> None:
    put_job(tmp_path / "seed=0", ["seed=0"], 0.5)
    (put_job(tmp_path / "other", ["seed=1"], 0.5) / ".hydra" / "overrides.yaml").write_text(content)
    assert [job.folder.name for job in sweep.read_jobs(tmp_path)] == ["seed=0"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("jobs.json", "5"),
        ("jobs.json", "{"),
        ("jobs.json", "[" * 3000),
        ("jobs.json", '{"keys": "seed", "jobs": {"seed=2": ["seed=2"]}}'),
        ("jobs.json", '{"keys": ["seed"], "jobs": {"seed=2": "seed=2"}}'),
        ("jobs.json", '{"keys": ["seed"], "jobs": {"seed=2": [2]}}'),
        ("seed=0/.hydra/config.yaml", "5"),
        ("seed=0/.hydra/config.yaml", "sweep: 5"),
        ("seed=0/.hydra/config.yaml", "[" * 3000),
        ("seed=0/metrics.csv", "epoch,val/acc\n1,high\n"),
        ("seed=0/metrics.csv", "epoch\n1,2,3\n"),
    ],
)
def test_other_files_with_other_content_are_ignored(tmp_path: Path, file: str, content: str) -> None:
    for seed in (0, 1):
        put_job(tmp_path / f"seed={seed}", [f"seed={seed}"], 0.5 if seed else None)
    (tmp_path / file).write_text(content)
    assert [job.status for job in sweep.read_jobs(tmp_path)] == ["unfinished", "finished"]


def test_the_order_and_the_worst_seed_follow_the_metric(tmp_path: Path) -> None:
    for lr, losses in (("0.1", (0.2, 0.9)), ("0.05", (0.4, 0.5))):
        for seed, loss in enumerate(losses):
            words = [f"optimizer.lr={lr}", f"seed={seed}"]
            put_job(tmp_path / f"lr={lr},seed={seed}", words, 1 - loss, metrics={"val/loss": loss})
    for metric, worst in (("val/loss", [0.5, 0.9]), ("val/acc", [0.5, 0.1])):
        rows = group_by_seed(sweep.read_jobs(tmp_path), metric)
        assert [row.keys["optimizer.lr"] for row in rows] == ["0.05", "0.1"]
        assert [row.summarize(metric)["worst"] for row in rows] == pytest.approx(worst)
    # The standard deviation is that of a sample: 0.4 and 0.5 are each 0.05 from their mean, and one is subtracted.
    assert rows[0].summarize("val/loss")["std"] == pytest.approx((2 * 0.05**2 / (2 - 1)) ** 0.5)


def test_the_sampling_error_is_that_of_the_number_of_test_images(tmp_path: Path) -> None:
    for lr, images in (("0.1", 10_000), ("0.2", None)):
        put_job(tmp_path / f"lr={lr}", [f"optimizer.lr={lr}"], 0.915, test_images=images)
    errors = {
        row.keys["optimizer.lr"]: row.sampling_error() for row in group_by_seed(sweep.read_jobs(tmp_path), "val/acc")
    }
    assert errors == {"0.1": pytest.approx((0.915 * 0.085 / 10_000) ** 0.5), "0.2": None}


def test_what_is_no_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        sweep.read_jobs(tmp_path / "none")
    with pytest.raises(UserError, match="no job was started here"):
        sweep.read_jobs(tmp_path)
    put_job(tmp_path / "first", ["seed=0"], 0.9)
    with pytest.raises(UserError, match=f"first: is a single run, .* with the others: nin report {tmp_path}$"):
        sweep.read_jobs(tmp_path / "first")


def test_a_sweep_continues_after_a_failure_and_finished_jobs_are_not_run_again(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIN_DATA", str(data_root))
    small = merge([*SMALL, "callbacks=none", "logger=none", "trainer.max_epochs=1", "threads=1"])
    command = ["-m", *small, "name=lr", "schedule=constant", "model.norm=none"]
    words = ["optimizer.lr=1e30,0.001,0.002", "hydra.sweeper.max_batch_size=2"]  # one more in its batch, one after it
    assert cli.run("train", [*command, *words]) == 1
    sys.stdout.flush()
    first = capfd.readouterr()
    assert "Error executing job" not in first.err  # Hydra's own line, with the overrides of the first that failed
    folder = tmp_path / "outputs" / "sweeps" / "lr"
    results = read_results(folder)
    assert {name: result["status"] for name, result in results.items()} == {
        "optimizer.lr=1e+30": "failed",
        "optimizer.lr=0.001": "finished",
        "optimizer.lr=0.002": "finished",
    }
    error = results["optimizer.lr=1e+30"]["error"]
    assert error.startswith("NonFiniteLossError: the loss is")
    for text in (first.err, (folder / "optimizer.lr=1e+30" / "nin.log").read_text()):
        assert "Traceback" in text
        assert error.partition(": ")[2] in text
    assert "failed: optimizer.lr=1e+30: NonFiniteLossError" in first.out

    # The same job alone is the same job.
    requested = [*small, *command[-2:], "optimizer.lr=0.001", f"data.root={data_root}"]
    alone = run_experiment(validate(compose_config(requested)), RunFolder(tmp_path / "alone"))
    assert results["optimizer.lr=0.001"]["weights_sha256"] == alone["weights_sha256"]

    # The same command again leaves finished jobs as they are; one more value is one more job.
    times = {p: p.stat().st_mtime_ns for p in (folder / "optimizer.lr=0.001").rglob("*")}
    time.sleep(0.01)
    assert cli.run("train", [*command, "optimizer.lr=0.001,0.003"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "optimizer.lr=0.001").rglob("*")} == times
    assert (folder / "optimizer.lr=0.003" / "result.json").exists()

    # A mistake in any job is found before the first begins; another fixed setting is refused by name.
    capfd.readouterr()
    assert cli.run("train", [*command, "optimizer.lr=0.004,-1", "data.image_size=28,0"]) == 2
    assert capfd.readouterr().err.startswith("nin train: 2 errors\n  data.image_size=0: must be")
    assert not list(folder.glob("optimizer.lr=0.004*"))
    other = [word for word in command if not word.startswith("model.dropout=")]
    assert cli.run("train", [*other, "optimizer.lr=0.005,0.001,0.002", "model.dropout=0.3"]) == 2
    error = capfd.readouterr().err
    assert "optimizer.lr=0.001 belongs to another experiment" in error.replace("\n", "")
    assert error.count("belongs to another experiment") == 1
    assert not (folder / "optimizer.lr=0.005").exists()


def test_a_process_id_that_no_process_can_have_is_of_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.update_state(pid=os.getpid(), host=socket.gethostname())
    assert is_running(folder)
    folder.update_state(pid=10**30, host=socket.gethostname())
    assert not is_running(folder)


def test_each_option_of_a_group_in_a_package_has_a_folder() -> None:
    jobs = [["+extra@callbacks=a", "seed=0"], ["+extra@callbacks=b", "seed=0"], ["~extra@callbacks", "seed=0"]]
    assert sweep.folder_names(jobs[:2], ["extra@callbacks"]) == ["+extra@callbacks=a", "+extra@callbacks=b"]
    overrides = parse_overrides(["+extra@callbacks=a,b", "+extra@logger=c,d", "seed=0"])
    assert list(map(sweep.key_of, overrides)) == ["extra@callbacks", "extra@logger", "seed"]
    assert sweep.folder_names(jobs, ["seed"]) == ["seed=0"] * 3


def test_a_value_on_the_command_line_replaces_the_sweep_files() -> None:
    params = {"model.conv1x1_layers": "0,1", "seed": "0,1"}

    def jobs(*task: str) -> list[list[str]]:
        left = sweep.without_overridden(params, task)
        return sweep.expand_jobs(parse_overrides([*(f"{key}={values}" for key, values in left.items()), *task]))

    assert jobs("experiment=cpu") == [
        [f"model.conv1x1_layers={layers}", f"seed={seed}", "experiment=cpu"] for layers in (0, 1) for seed in (0, 1)
    ]
    assert jobs("seed=7") == [[f"model.conv1x1_layers={n}", "seed=7"] for n in (0, 1)]
    assert sweep.without_overridden(params, ["seed=7"]) == {"model.conv1x1_layers": "0,1"}
    assert sweep.without_overridden({"+model.drop": "0,1", "seed": "0,1"}, ["+model.drop=0"]) == {"seed": "0,1"}


# Searches are tested in test_search.py: their values are not known beforehand.
GRIDS = sorted(path for path in (CONF / "sweep").glob("*.yaml") if "sweeper: optuna" not in path.read_text())


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_ready_sweep_is_valid_in_its_first_and_last_job(path: Path) -> None:
    params = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    on_a_cpu = ["experiment=nin_small", *(["data.image_size=67"] if path.stem == "networks" else [])]
    for task in ([], on_a_cpu):
        jobs = sweep.expand_jobs(parse_overrides([*(f"{key}={values}" for key, values in params.items()), *task]))
        assert len(jobs) > 2
        for job in (jobs[0], jobs[-1]):
            assert validate(compose_config([f"sweep={path.stem}", *job])).seed == (0 if job is jobs[0] else 2)


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_states_its_result(path: Path) -> None:
    header = path.read_text().partition("\ndefaults:")[0].partition("\ndata:")[0]
    assert f"experiment={path.stem}" in header
    assert re.search(r"test/acc 0\.\d{4}\b", header.replace("\n# ", " "))


def test_a_result_of_impossible_numbers_does_not_end_the_report(tmp_path: Path) -> None:
    job = put_job(tmp_path / "seed=0", ["seed=0"], 0.9)
    for numbers in ('"test_images": 0', '"test_images": -5', f'"train_seconds": 1{"0" * 400}'):
        metrics = '{"val/acc": 0.9, "test/acc": 0.9}'
        (job / "result.json").write_text(f'{{"status": "finished", "metrics": {metrics}, {numbers}}}')
        (row,) = group_by_seed(sweep.read_jobs(tmp_path), "test/acc")
        assert (row.sampling_error(), row.median_seconds()) == (None, None)
    sweep.write_requested_jobs(tmp_path, ["seed"], {"seed=9": [f"seed={'9' * 5000}"]})
    assert [job.status for job in sweep.read_jobs(tmp_path)] == ["finished", "not started"]


def test_other_precisions_are_other_rows(tmp_path: Path) -> None:
    for seed, precision in ((0, "32-true"), (1, "32-true"), (2, "bf16-mixed")):
        config = f"seed: {seed}\ntrainer: {{precision: {precision}}}\n"
        words = [f"seed={seed}", f"trainer.precision={precision}"]
        put_job(tmp_path / f"seed={seed}", words, 0.9, config)
    assert keys_and_counts(tmp_path) == [
        ({"trainer.precision": "32-true"}, 2),
        ({"trainer.precision": "bf16-mixed"}, 1),
    ]
