import csv
import errno
import io
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from helpers import put_job
from nin.sweeps import chart, summary
from nin.sweeps.jobs import read_jobs, write_requested_jobs
from nin.sweeps.rows import group_by_seed


@pytest.fixture
def lr_sweep(tmp_path: Path) -> Path:
    sweep = tmp_path / "lr"
    for lr, accs in (("0.1", (0.8, 0.9)), ("0.05", (0.91, 0.93))):
        for seed, acc in enumerate(accs):
            put_job(sweep / f"lr={lr},seed={seed}", ["experiment=cpu", f"optimizer.lr={lr}", f"seed={seed}"], acc)
    failed = {"status": "failed", "error": "NonFiniteLossError: nan"}
    put_job(sweep / "failed", ["experiment=cpu", "optimizer.lr=9", "seed=0"], **failed)
    put_job(sweep / "begun", ["experiment=cpu", "optimizer.lr=0.1", "seed=2"])
    return sweep


def test_seeds_are_summarized_and_the_best_row_comes_first(lr_sweep: Path) -> None:
    jobs = read_jobs(lr_sweep)
    rows = group_by_seed(jobs, "val/acc")
    assert summary.tabulate(rows, "val/acc") == [
        ["optimizer.lr", "val/acc", "worst", "test/acc", "worst", "seconds", "runs"],
        ["0.05", "0.9200 ± 0.0141", "0.9100", "0.9200 ± 0.0141", "0.9100", "2", "2"],
        ["0.1", "0.8500 ± 0.0707", "0.8000", "0.8500 ± 0.0707", "0.8000", "2", "3 (1 unfinished)"],
        ["9", "", "", "", "", "", "1 (1 failed)"],
    ]
    assert summary.tabulate(rows, "val/acc", merge_keys=True, all_worst=False)[:2] == [
        ["settings", "val/acc", "worst", "test/acc", "seconds", "runs"],
        ["lr=0.05", "0.9200 ± 0.0141", "0.9100", "0.9200 ± 0.0141", "2", "2"],
    ]
    assert summary.describe_failures(jobs) == ["failed: NonFiniteLossError: nan"]


def test_the_seconds_are_the_median_and_the_hardware_is_named(tmp_path: Path) -> None:
    sweep = tmp_path / "seeds"
    for seed, seconds in enumerate((41.0, 43.0, 300.0)):  # the last one was disturbed
        more = {"device": "cpu (x86_64, 2 threads)", "versions": {"torch": "2.15.0"}, "train_seconds": seconds}
        more |= {"precision": "bf16-mixed"} if seed else {}  # the first is of an earlier version
        put_job(sweep / f"seed={seed}", ["experiment=cpu", f"seed={seed}"], 0.9, **more)
    summary.report(sweep)
    text = (sweep / "summary.md").read_text()
    assert "| 43 | 3 |" in text
    hardware = "cpu (x86_64, 2 threads), torch 2.15.0; cpu (x86_64, 2 threads), bf16-mixed, torch 2.15.0"
    assert f"Median seconds of training on {hardware}." in text
    with (sweep / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_seconds median"]) == 43


def test_runs_of_different_commits_are_named(tmp_path: Path) -> None:
    sweep, commits = tmp_path / "seeds", ["1" * 40, "1" * 40, "2" * 40 + "+"]
    for seed in range(2):
        put_job(sweep / f"seed={seed}", [f"seed={seed}"], 0.9, git_commit=commits[seed])
    summary.report(sweep)
    assert "different code" not in (sweep / "summary.md").read_text()
    put_job(sweep / "seed=2", ["seed=2"], 0.9, git_commit=commits[2])
    summary.report(sweep)
    line = "The runs are of different code (commits; + is one with changes): 1111111111, 2222222222+."
    assert line in (sweep / "summary.md").read_text()


def test_networks_of_different_sizes_have_a_column_of_parameters(tmp_path: Path) -> None:
    for widths, parameters in (("[8]", 1234), ("[16]", 1_234_567)):
        put_job(tmp_path / widths, [f"model.widths={widths}"], 0.9 - parameters / 1e8, parameters=parameters)
    header, *table = summary.tabulate(group_by_seed(read_jobs(tmp_path), "val/acc"), "val/acc")
    assert [line[header.index("parameters")] for line in table] == ["1,234", "1,234,567"]
    summary.report(tmp_path)
    lines = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [line["parameters"] for line in lines] == ["1234", "1234567"]
    assert (
        "parameters" not in summary.tabulate(group_by_seed(read_jobs(tmp_path), "val/acc"), "val/acc", sizes=False)[0]
    )
    for name, words in (("one size", ["seed=1"]), ("unknown", ["seed=2"])):
        put_job(tmp_path / "sweep" / name, words, 0.9, **({"parameters": 5} if name == "one size" else {}))
    assert "parameters" not in summary.tabulate(group_by_seed(read_jobs(tmp_path / "sweep"), "val/acc"), "val/acc")[0]


def test_two_rows_are_compared_seed_by_seed(tmp_path: Path) -> None:
    for norm, accs in (("batch", (0.80, 0.92, 0.95)), ("none", (0.79, 0.90))):
        for seed, acc in enumerate(accs):
            put_job(tmp_path / f"{norm}{seed}", [f"model.norm={norm}", f"seed={seed}"], acc)
    summary.report(tmp_path)
    # 0.01 and 0.02, whose mean has a smaller deviation than the accuracies themselves
    differences = "+0.0150 ± 0.0071 of val/acc (2 seeds), +0.0150 ± 0.0071 of test/acc (2 seeds)"
    assert f"First row minus second, seed by seed: {differences}." in (tmp_path / "summary.md").read_text()
    put_job(tmp_path / "third", ["model.norm=layer", "seed=0"], 0.5)
    summary.report(tmp_path)
    assert "seed by seed" not in (tmp_path / "summary.md").read_text()


def test_each_run_has_a_line_in_a_file_of_its_own(lr_sweep: Path) -> None:
    done = {"parameters": 77, "epochs": 4, "steps": 12, "git_commit": "1" * 40}
    put_job(lr_sweep / "lr=1,seed=0", ["experiment=cpu", "optimizer.lr=1", "seed=0"], 0.25, **done)
    summary.report(lr_sweep)
    runs = {line.pop("folder"): line for line in csv.DictReader((lr_sweep / "runs.csv").read_text().splitlines())}
    assert set(runs) == {path.name for path in lr_sweep.iterdir() if path.is_dir()}
    assert runs["lr=1,seed=0"] == {
        "optimizer.lr": "1", "seed": "0", "status": "finished", "val/acc": "0.25", "val/loss": "1.0",
        "test/acc": "0.25", "test/loss": "1.0", "epochs": "4", "steps": "12", "train_seconds": "2.0",
        "parameters": "77", "test_images": "10000", "hardware": "", "commit": "1" * 40,
    }  # fmt: skip
    assert (runs["failed"]["status"], runs["failed"]["val/acc"]) == ("failed", "")
    assert (runs["begun"]["status"], runs["begun"]["seed"]) == ("unfinished", "2")


def test_many_different_numbers_of_test_images_are_a_range(tmp_path: Path) -> None:
    for seed, images in enumerate((100, 2500, 10_000)):
        put_job(tmp_path / "sweep" / f"seed={seed}", [f"seed={seed}"], 0.5, test_images=images)
    summary.report(tmp_path / "sweep")
    # sqrt(0.5 * 0.5 / 100), of the smallest number in the row
    line = "Sampling error of test/acc (100 to 10,000 images, sqrt(p(1-p)/n)): 0.0500."
    assert line in (tmp_path / "sweep" / "summary.md").read_text()


def test_the_summary_says_what_plus_minus_is_and_how_far_test_images_decide(lr_sweep: Path) -> None:
    summary.report(lr_sweep)
    text = (lr_sweep / "summary.md").read_text()
    assert text.startswith("# lr: best val/acc first, 2 seeds per row\n")
    assert "| 0.05 | 0.9200 ± 0.0141 |" in text
    assert "± is the sample standard deviation over seeds." in text
    # sqrt(0.92 * 0.08 / 10000) and sqrt(0.85 * 0.15 / 10000)
    assert "Sampling error of test/acc (10,000 images, sqrt(p(1-p)/n)): 0.0027 to 0.0036." in text
    lines = list(csv.DictReader((lr_sweep / "summary.csv").read_text().splitlines()))
    assert [float(line["val/acc mean"]) for line in lines[:2]] == pytest.approx([0.92, 0.85])
    assert float(lines[0]["test/acc sampling_error"]) == pytest.approx(math.sqrt(0.92 * 0.08 / 10_000))
    assert [line["finished"] for line in lines] == ["2", "2", "0"]
    assert (lr_sweep / "summary.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [80, 200])
def test_many_varied_keys_are_readable(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    keys = ["model.norm", "model.conv1x1_layers", "optimizer.weight_decay", "data.augment", "model.dropout"]
    for i in range(4):
        values = [["none", "batch"][i % 2], str(i), f"0.000{i}", ["flip", "none"][i // 2], f"0.{i}"]
        overrides = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        for seed in (0, 1):
            put_job(tmp_path / f"{i},{seed}", [*overrides, f"seed={seed}"], 0.9 + i / 100 + seed / 1000)
    summary.report(tmp_path)
    output = capsys.readouterr().out
    table = output.partition("±  is")[0].splitlines()
    assert max(map(len, table[:-3])) <= width
    words = output.split()
    if width == 80:
        assert {"settings", "norm=batch", "conv1x1_layers=3", "weight_decay=0.0003", "augment=none"} <= set(words)
    else:
        assert {*keys, "batch", "0.0003"} <= set(words)
    assert "0.9305 ± 0.0007" in output


def test_no_word_is_broken_at_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for lr in ("0.01", "1e+30"):
        for seed in (0, 1):
            failed = {"status": "failed", "error": "the loss is nan"} if lr == "1e+30" else {}
            put_job(tmp_path / f"{lr},{seed}", [f"optimizer.lr={lr}", f"seed={seed}"], 0.9 + seed / 10, **failed)
    summary.report(tmp_path)
    output = capsys.readouterr().out
    table = output.partition("±  is")[0]
    assert "optimizer.lr" in table
    assert "2 (2 failed)" in table


def test_settings_are_readable_beside_more_numbers_than_fit_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for decay in ("0.0001", "0.0002"):
        for seed in (0, 1):
            put_job(tmp_path / f"{decay},{seed}", [f"optimizer.weight_decay={decay}", f"seed={seed}"], 0.9)
    summary.report(tmp_path, "val/loss")
    output = capsys.readouterr().out
    assert {"weight_decay=0.0001", "weight_decay=0.0002", "settings"} <= set(output.split())
    rows = [line for line in output.splitlines() if "weight_decay" in line]
    assert all(len(row) <= 80 + 24 for row in rows)


def test_single_runs_are_listed_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = (("first", ["experiment=cpu"], 0.9, "garments"), ("second", ["model=lenet", "seed=0"], 0.8, "mnist"))
    for name, overrides, acc, data in runs:
        config = f"seed: 0\nsweep: {{keys: [], fail_fast: false}}\ndata: {{name: {data}}}\n"
        put_job(tmp_path / name, overrides, acc, config)
    put_job(tmp_path / "third", [])
    summary.report(tmp_path)
    rows = group_by_seed(read_jobs(tmp_path), "val/acc")
    assert summary.tabulate(rows, "val/acc") == [
        ["run", "overrides", "val/acc", "test/acc", "seconds", "status"],
        ["first", "experiment=cpu", "0.9000", "0.9000", "2", "finished"],
        ["second", "model=lenet seed=0", "0.8000", "0.8000", "2", "finished"],
        ["third", "", "", "", "", "unfinished"],
    ]
    output = capsys.readouterr().out
    assert "standard deviation" not in output
    assert "seeds" not in output
    assert "The runs are on different data (garments, mnist): compare those of one data set.\n" in output


def test_one_single_run_is_listed_by_its_name_too(tmp_path: Path) -> None:
    put_job(tmp_path / "first", ["experiment=cpu"], 0.9, "seed: 0\nsweep: {keys: [], fail_fast: false}\n")
    header, row = summary.tabulate(group_by_seed(read_jobs(tmp_path), "val/acc"), "val/acc")
    assert (header[0], row[0]) == ("run", "first")


def draw(sweep: Path, metric: str = "val/acc", x_axis: str = "epochs") -> Figure:
    """Draws the chart and lays it out as for saving."""
    figure = chart.draw("title", group_by_seed(read_jobs(sweep), metric), metric, x_axis)
    figure.draw_without_rendering()
    return figure


def test_an_accuracy_axis_ends_at_one(tmp_path: Path) -> None:
    for head in ("gap", "fc"):
        for seed, acc in enumerate((1.0, 0.9)):
            put_job(tmp_path / f"h/{head},{seed}", [f"model.head={head}", f"seed={seed}"], acc)
            lr = {"gap": 1, "fc": 2}[head]
            put_job(tmp_path / f"l/{lr},{seed}", [f"optimizer.lr={lr}", f"seed={seed}"], acc)
    for sweep in ("h", "l"):
        left, right = draw(tmp_path / sweep).axes
        for low, high in (left.get_xlim() if sweep == "h" else left.get_ylim(), right.get_ylim()):
            assert 0 <= low < high <= 1
    left, _ = draw(tmp_path / "h").axes
    assert [text.get_text() for text in left.texts] == ["0.9500 ± 0.0707"] * 2


def test_the_curves_are_over_epochs_or_seconds(lr_sweep: Path) -> None:
    for x_axis, label, values in (("epochs", "epoch", [1, 2]), ("seconds", "seconds of training", [8, 16])):
        _, right = draw(lr_sweep, x_axis=x_axis).axes
        assert right.get_xlabel() == label
        assert [list(line.get_xdata()) for line in right.lines if len(line.get_xdata())] == [values] * 4


def test_a_curve_along_the_frame_is_visible(tmp_path: Path) -> None:
    job = put_job(tmp_path / "s/0", ["optimizer.lr=0.1", "seed=0"], 1.0)
    (job / "metrics.csv").write_text("epoch,val/acc,seconds\n1,1.0,8\n2,1.0,16\n")
    figure = draw(tmp_path / "s")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    x, y = figure.axes[1].transData.transform((1.5, 1.0)).round().astype(int)
    blue = np.asarray(to_rgb("tab:blue")) * 255
    pixels = np.flipud(np.asarray(canvas.buffer_rgba()))[y - 3 : y + 3, x, :3]
    assert np.abs(pixels - blue).max(1).min() < 30


def test_epochs_are_whole_numbers(tmp_path: Path) -> None:
    put_job(tmp_path / "s/0", ["optimizer.lr=0.1", "seed=0"], 0.9)
    (tmp_path / "s/0/metrics.csv").write_text("epoch,val/acc,seconds\n1,0.9,8\n")
    _, right = draw(tmp_path / "s").axes
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "1", "2"]


def test_of_a_metric_that_is_measured_once_there_are_no_curves(lr_sweep: Path) -> None:
    _, right = draw(lr_sweep, metric="test/acc").axes
    assert [text.get_text() for text in right.texts] == ["no curves: metrics.csv has no test/acc"]
    assert not right.axison
    assert right.get_legend() is None


def test_labels_and_legends_stay_on_the_page(tmp_path: Path) -> None:
    for i in range(30):
        overrides = [
            f"model.head={'gap' if i % 2 else 'fc'}",
            f"optimizer.lr=0.{i + 1}",
            f"data.augment=flip_shift_{i}",
        ]
        put_job(tmp_path / "many" / str(i), overrides, 0.9)
        put_job(tmp_path / "one" / str(i), [f"optimizer.lr=0.{i + 1}"], 0.9)
    for sweep in ("many", "one"):
        figure = draw(tmp_path / sweep)
        left, right = figure.axes
        page = figure.bbox
        if sweep == "many":
            boxes = [label.get_window_extent() for label in left.get_yticklabels()]
        else:
            boxes = [right.get_legend().get_window_extent()]
        assert all(page.x0 <= b.x0 and b.x1 <= page.x1 and page.y0 <= b.y0 and b.y1 <= page.y1 for b in boxes)
    left, _ = draw(tmp_path / "many").axes
    assert len(left.get_yticklabels()) == 20
    tops = sorted((label.get_window_extent().y0, label.get_window_extent().y1) for label in left.get_yticklabels())
    assert all(below[1] <= above[0] for below, above in pairwise(tops))  # none overlaps another


def test_a_loss_that_is_nan_is_left_out(tmp_path: Path) -> None:
    for seed in (0, 1):
        loss = math.nan if seed else 2.0
        put_job(tmp_path / f"seed={seed}", [f"seed={seed}"], 0.5, metrics={"test/loss": loss})
    summary.report(tmp_path)
    (line,) = csv.DictReader((tmp_path / "summary.csv").read_text().splitlines())
    assert (line["test/loss mean"], line["test/loss std"], line["val/acc mean"]) == ("2.0", "", "0.5")


def test_a_sweep_that_can_only_be_read_is_reported_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_job(tmp_path / "seed=0", ["seed=0"], 0.5)
    (tmp_path / "summary.csv").mkdir()
    summary.report(tmp_path)
    output = capsys.readouterr()
    assert "0.5000" in output.out
    assert output.err.startswith("no summary: ")


def test_a_reader_that_is_gone_is_no_summary_that_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone(io.StringIO):
        """As of `nin report … | head`, which has ended after the table."""

        def write(self, text: str) -> int:
            if text.startswith("summary:"):
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return super().write(text)

    put_job(tmp_path / "seed=0", ["seed=0"], 0.5)
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):  # which ends the program without a message
        summary.report(tmp_path)
    assert capsys.readouterr().err == ""
    assert (tmp_path / "summary.png").exists()


def test_without_held_out_images_the_test_accuracy_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_job(tmp_path / "seed=0", ["seed=0"], 0.5, metrics={"val/acc": None, "val/loss": None})
    summary.report(tmp_path)
    assert "best test/acc first" in capsys.readouterr().out


def test_a_sweep_without_metrics_yet_is_not_said_to_be_sorted_by_test_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        put_job(tmp_path / "begun" / f"seed={seed}", [f"seed={seed}"])
    summary.report(tmp_path / "begun")
    assert "best val/acc first" in capsys.readouterr().out


def test_lists_of_words_are_shown_and_an_error_of_several_lines_takes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_job(tmp_path / "blocks" / "0", ["model.blocks=[conv,pool]"], 0.9)
    put_job(tmp_path / "blocks" / "1", ["model.blocks=[pool]"], 0.8)
    put_job(tmp_path / "blocks" / "2", ["model.blocks=[conv]"], status="failed", error="E: one\ntwo")
    summary.report(tmp_path / "blocks")
    out = capsys.readouterr().out
    assert "[conv,pool]" in out
    assert "failed: 2: E: one\n" in out
    assert "two" not in out


def test_cells_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = ("[conv,pool]", "[/x]", "[red]", ":x:", "[bold")
    for i, value in enumerate(cells):
        put_job(tmp_path / "s" / str(i), [f"model.blocks={value}"], 0.9)
        run = tmp_path / "runs" / f"{i},{value.replace('/', '')}"
        put_job(run, [f"model.blocks={value}"], 0.9, "sweep: {keys: []}")
    for folder in ("s", "runs"):
        summary.report(tmp_path / folder)
        printed = capsys.readouterr().out
        assert all(value in printed for value in cells), folder


def test_control_characters_of_a_folder_from_elsewhere_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m"
    sweep = tmp_path / "s"
    write_requested_jobs(sweep, ["seed", evil], {"../x": [f"model.dropout={evil}", f"{evil}=1"]})
    more = {"device": f"cpu{evil}", "versions": {"torch": f"2{evil}"}, "seed": f"1{evil}"}
    config = {"trainer": {"max_epochs": f"1{evil}"}, "callbacks": {f"my{evil}": {"_target_": f"my{evil}"}}}
    job = put_job(sweep / f"0{evil}", [f"model.norm=a{evil}"], 0.9, json.dumps(config), **more)
    put_job(sweep / f"1{evil}", [f"model.norm{evil}=b"], status="failed", error=f"E: {evil}")
    write_config = '{"trainer": {"max_epochs": 2}, "callbacks": {}, "sweep": {"keys": []}}'
    for number, single in enumerate((False, True)):
        if single:
            (job / ".hydra" / "config.yaml").write_text(write_config)
        summary.report(sweep)
        printed = capsys.readouterr().out + (sweep / "summary.md").read_text()
        assert not [c for c in printed if not c.isprintable() and c != "\n"], number
        assert "\\x1b]0;title\\x07" in printed


def test_a_vertical_bar_does_not_end_a_cell_of_the_summary(tmp_path: Path) -> None:
    for value in ("'a|b'", "c"):
        put_job(tmp_path / "bars" / value, [f"model.norm={value}"], 0.9)
    summary.report(tmp_path / "bars")
    text = (tmp_path / "bars" / "summary.md").read_text()
    assert "| a\\|b | 0.9000 |" in text


def test_dollar_signs_are_drawn_as_they_are(tmp_path: Path) -> None:
    for value in ("'a_$5'", "'$5_to_$10'"):
        put_job(tmp_path / "money" / value, [f"model.widths={value}"], 0.9)
    for value in ("1", "2"):
        put_job(tmp_path / "key" / value, [rf"a$\frac$={value}"], 0.9)
    for sweep in ("money", "key"):  # a formula with a syntax error can't be drawn
        summary.report(tmp_path / sweep)
        assert (tmp_path / sweep / "summary.png").stat().st_size > 10_000
    rows = group_by_seed(read_jobs(tmp_path / "money"), "val/acc")
    left, _ = chart.draw("money", rows, "val/acc", "epochs").axes
    assert sorted(label.get_text() for label in left.get_yticklabels()) == [r"widths=\$5_to_\$10", r"widths=a_\$5"]


def test_a_job_without_curves_does_not_make_the_axes_narrow(lr_sweep: Path) -> None:
    (next(lr_sweep.glob("*/metrics.csv"))).unlink()
    for metric in ("val/acc", "test/acc"):
        left, right = draw(lr_sweep, metric).axes
        assert min(left.get_position().width, right.get_position().width) > 0.35


def test_over_a_number_every_row_is_drawn(tmp_path: Path) -> None:
    for i in range(30):
        put_job(tmp_path / str(i), [f"optimizer.lr=0.{i + 10}"], 0.5 + i / 100)
    figure = draw(tmp_path)
    assert len(figure.axes[0].lines[0].get_xdata()) == 30
    assert figure.get_suptitle() == "title (curves of the best 20 of 30 rows)"
