import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from helpers import broken_pipe
from nin import cli
from nin.bench import overhead, turns
from nin.commands import bench
from nin.config.schema import Settings, UserError
from nin.system.processes import StoppedError
from nin.training.classifier import Classifier


def test_results_are_printed_and_written(
    tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(overhead, "_STEPS", 20)
    monkeypatch.setattr(overhead, "_WARM_UP", 2)
    # On the meta device, where the largest matrices take no time either.
    measure, meta = turns.measure_matrix_product, torch.device("meta")
    monkeypatch.setattr(turns, "measure_matrix_product", lambda _, *arguments: measure(meta, *arguments))
    begun, scored = [""], set[str]()
    report, step = turns.Turns.report, Classifier.validation_step
    monkeypatch.setattr(turns.Turns, "report", lambda self, name: (begun.append(name), report(self, name)))
    monkeypatch.setattr(Classifier, "validation_step", lambda *given: (scored.add(begun[-1]), step(*given)))
    out = tmp_path / "bench.json"
    overrides = [
        "model=nin_small", "model.widths=[4,8]", "data.batch_size=64", "trainer=cpu", f"data.root={data_root}",
        "data.val_size=9900", "trainer.log_every_n_steps=2", "threads=1",
    ]  # fmt: skip
    assert cli.run("bench", [*overrides, "--seconds", "0.2", "--rounds", "1", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert set(results["rates"]) == {"training", "notebooks", "data", "scoring", "export", "matrix product"}
    assert min(results["rates"].values()) > 0
    assert scored == {"scoring"}
    assert set(results["milliseconds_per_step"]) == {"plain loop", "bare Trainer", "nin train"}
    printed = capsys.readouterr()
    rates_table, *_ = printed.out.split("└")
    rows = {line.split("│")[1].strip(): line for line in rates_table.splitlines() if line.startswith("│")}
    assert f"{results['rates']['notebooks']:,.1f}" in rows["the notebooks' loop"]
    assert f"{results['rates']['training'] / results['rates']['notebooks']:.2f}" in rows["nin train"]
    share = results["rates"]["training"] * results["operations"]["training"] / results["rates"]["matrix product"]
    assert f"{share:.2f}" in rows["nin train"]
    share = results["rates"]["export"] * results["operations"]["scoring"] / results["rates"]["matrix product"]
    expected = [
        f"{results['rates']['export']:,.1f}",
        "",
        f"{results['operations']['scoring'] / 1e9:.3g}",
        f"{share:.2f}",
    ]
    assert [cell.strip() for cell in rows["export (model.onnx)"].split("│")[2:6]] == expected
    assert f"written: {out}" in printed.out
    assert "round 1 of 1" in printed.err
    # Only the activations depend on the batch size.
    small, _, large = results["memory"].values()
    assert list(results["memory"]) == ["16", "32", "64"]
    for part in ("weights", "gradients", "optimizer"):
        assert small[part] == large[part]
    assert small["activations"] > 0
    assert large["activations"] == pytest.approx(4 * small["activations"], rel=0.05)
    assert small["gradients"] == 4 * (4 * 9 + 2 * 4 * 4 + 3 * 2 * 4 + 8 * 4 * 9 + 2 * 8 * 8 + 3 * 2 * 8
                                      + 128 * 8 * 9 + 128 * 128 + 2 * 2 * 128 + 10 * 128 + 2 * 10)  # fmt: skip


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    for is_terminal in (True, False):
        screen = io.StringIO()
        with bench.show_progress(Console(file=screen, force_terminal=is_terminal, width=80)) as progress:
            progress("loading …", "", 0, None)
            for done in range(4):
                progress(f"round {done // 2 + 1} of 2", ("training", "data")[done % 2], done, 4)
        if is_terminal:
            assert "round 2 of 2: data" in screen.getvalue()
            assert "75%" in screen.getvalue()
        else:
            assert screen.getvalue() == "loading …\nround 1 of 2\nround 2 of 2\n"


RESULTS: dict[str, Any] = {
    "rates": dict.fromkeys(("training", "notebooks", "data", "scoring", "matrix product"), 1.0),
    "operations": {"training": 3, "scoring": 1},
    "settings": {"model": {"name": "nin"}, "data": {"image_size": 224, "batch_size": 128}},
    "device": "cpu",
    "precision": "32-true",
    "milliseconds_per_step": {"bare Trainer": 1.0},
    "memory": {},
}


def test_results_that_nobody_reads_are_written(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "run_benchmarks", lambda *_: RESULTS)
    with os.fdopen(broken_pipe(), "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        words = [f"data.root={data_root}", "--out", str(tmp_path / "bench.json")]
        monkeypatch.setattr(sys, "argv", ["nin", "bench", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 141
    assert json.loads((tmp_path / "bench.json").read_text()) == RESULTS


def test_results_that_can_not_be_written_are_printed(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "run_benchmarks", lambda *_: RESULTS)
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "bench.json"
    assert cli.run("bench", [f"data.root={data_root}", "trainer=cpu", "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert "nin at 224x224, batch 128, cpu" in printed.out
    assert "written" not in printed.out
    message = f"nin bench: {out}: can't be written (File exists); give another path with --out\n"
    assert printed.err.endswith(f"\n{message}")


@pytest.mark.parametrize(("signum", "name", "status"), [(2, "SIGINT", 130), (15, "SIGTERM", 143)])
def test_a_measurement_that_is_stopped_writes_nothing(
    signum: int,
    name: str,
    status: int,
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object) -> None:
        raise StoppedError(signum)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "run_benchmarks", stop)
    assert cli.run("bench", [f"data.root={data_root}", "trainer=cpu"]) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err.splitlines()[-1]) == ("", f"stopped by {name}; nothing is written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds=0: must be 1 or more"),
        (["--seconds", "nan"], "--seconds=nan: must be a number above 0"),
        (["trainer=cpu", "trainer.devices=2"], "trainer: nin bench runs in one process"),
        (["model=nim"], "model=nim: no such model"),
        (["trainer.max_epochs=3"], "trainer.max_epochs: nin bench sets it"),
        (["model=nin_small", "--seconds", "1", "trainer.devices=2"], "trainer: nin bench runs in one process"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("bench", arguments) == 2
    assert capsys.readouterr().err.startswith(f"nin bench: {message}")


def test_a_data_module_of_ones_own_is_refused_before_it_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("_target_: nowhere.Images\nimage_size: 28\nbatch_size: 4\n")
    assert cli.run("bench", ["--config-dir", str(tmp_path), "data=mine", "model=nin_small", "trainer=cpu"]) == 2
    message = "nin bench: data: nin bench measures this project's own data modules; choose data=garments\n"
    assert capsys.readouterr().err == message


def test_images_that_are_too_small_are_refused(data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("bench", ["data.image_size=40", "trainer=cpu", f"data.root={data_root}"]) == 2
    _, *refused = capsys.readouterr().err.splitlines()  # after the line about loading torch
    assert refused[0].startswith("nin bench: data.image_size=40: nin needs at least 67 pixels per side")


def test_data_and_schedule_can_be_chosen() -> None:
    chosen = bench.compose_bench_settings(["data=mnist", "schedule=cosine"])
    assert (chosen.data.name, chosen.schedule.name) == ("mnist", "cosine")
    default = bench.compose_bench_settings(["experiment=cpu"])
    assert (default.data.name, default.schedule.name) == ("garments", "constant")
    assert bench.compose_bench_settings(["experiment=paper_cifar10"]).data.name == "cifar10"
    assert default.trainer.max_epochs == chosen.trainer.max_epochs == 1_000_000  # a turn ends training
    for word in ("trainer.max_steps=3", "trainer.max_time=00:00:01:00", "trainer.fast_dev_run=true"):
        with pytest.raises(UserError, match=f"^{word.partition('=')[0]}: nin bench sets it"):
            bench.compose_bench_settings([word])


def test_the_users_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [train, {override model: lenet}, _self_]\n")
    measured: list[str] = []

    def stop(settings: Settings) -> None:
        measured.append(settings.model.name)
        raise UserError("that is enough")

    monkeypatch.setattr(bench, "prepare", lambda data: None)
    monkeypatch.setattr(bench, "require_accelerator", lambda trainer: None)
    monkeypatch.setattr(bench, "run_benchmarks", lambda settings, *_: stop(settings))
    assert cli.run("bench", ["--config-dir", str(tmp_path), "--config-name", "mine", "trainer=cpu"]) == 2
    assert measured == ["lenet"]


def test_known_warnings_are_silenced() -> None:
    assert cli.run("bench", ["--rounds", "0"]) == 2
    ignored = [message.pattern for action, message, *_ in warnings.filters if action == "ignore" and message]
    assert any("number of training batches" in pattern for pattern in ignored)


def test_the_memory_fits_80_columns() -> None:
    console = Console(width=80, file=io.StringIO())
    parts = ("weights", "gradients", "optimizer", "activations", "activations_full_batch", "peak")
    console.print(bench._memory_table({128: dict.fromkeys(parts, 2**30 - 1)}))
    words = console.file.getvalue().split()  # type: ignore[attr-defined]
    assert {"activations", "micro-batches", "1,024.0"} <= set(words)


def test_results_name_a_network_of_ones_own_by_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    own = {"_target_": "my_net.TinyNet", "input_size": 28}
    bench.print_results(RESULTS | {"settings": RESULTS["settings"] | {"model": own}})
    assert capsys.readouterr().out.startswith("my_net.TinyNet at 224x224, batch 128, cpu")


@pytest.mark.parametrize(("precision", "in_float32"), [("32-true", "0.50"), ("bf16-mixed", "")])
def test_rates_in_float32_have_no_share_of_a_limit_in_bfloat16(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, precision: str, in_float32: str
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    rates = {"training": 3.0, "notebooks": 2.0, "scoring": 8.0, "export": 4.0, "data": 9.0, "matrix product": 4e9}
    operations = {"training": 1e9, "scoring": 0.5e9}
    bench.print_results(RESULTS | {"precision": precision, "rates": rates, "operations": operations})
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:6]] for line in printed.splitlines() if line.startswith("│")]
    shares = {name: share for name, *_, share in rows}
    assert shares["nin train"] == "0.75"
    assert shares["the notebooks' loop"] == shares["export (model.onnx)"] == in_float32
    assert shares["scoring (nin eval)"] == "1.00"
