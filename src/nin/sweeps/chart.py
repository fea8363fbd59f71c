"""The chart of a sweep: the final values on the left, the curves over training on the right; Optuna's of a search."""

import contextlib
import io
import statistics
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nin.runs.files import open_atomically
from nin.runs.folder import RunFolder
from nin.sweeps.rows import Row

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Color = tuple[float, float, float, float]

X_AXES = {"epochs": "epoch", "seconds": "seconds"}  # the values are columns of metrics.csv
_MAX_ROWS = 20
_LABEL_WIDTH = 36  # characters per line
# Points are drawn over the frame and not clipped, so that an accuracy of exactly 1 is visible; the bars of the standard
# deviation are clipped.
_ON_TOP: dict[str, Any] = {"clip_on": False, "zorder": 3}


def draw(title: str, rows: list[Row], metric: str, x_axis: str) -> "Figure":
    """Draws ``metric`` of the finished jobs of ``rows``, of at most 20 rows.

    On the left each row's mean, sample standard deviation and single seeds; on the right each run's curve in the color
    of its row.

    Args:
        x_axis: of the curves, a key of ``X_AXES``.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    from nin.data.overlays import escape, ignore_local_matplotlibrc

    ignore_local_matplotlibrc()
    finished = [row for row in rows if row.values(metric)]
    rows = finished[:_MAX_ROWS]
    labels = [escape(textwrap.fill(row.label, _LABEL_WIDTH)) for row in rows]
    lines = sum(label.count("\n") + 1 for label in labels) + len(labels)
    figure = Figure(figsize=(13, max(4.5, 1.5 + 0.16 * lines)), layout="constrained")
    left, right = figure.subplots(1, 2)
    is_cut = len(finished) > _MAX_ROWS
    palette = colormaps["tab10" if len(rows) <= 10 else "tab20"]
    colors = [palette(i) for i in range(len(rows))]
    gray = (0.6, 0.6, 0.6, 1.0)
    over_number = _draw_over_number(left, finished, metric, [*colors, *[gray] * (len(finished) - len(rows))])
    more = f" ({'curves of ' * over_number}the best {_MAX_ROWS} of {len(finished)} rows)" if is_cut else ""
    figure.suptitle(escape(textwrap.fill(f"{title}{more}", 120)))
    if not rows:
        left.text(0.5, 0.5, "no run has finished yet", ha="center", transform=left.transAxes)
    elif not over_number:
        _draw_by_row(left, rows, metric, labels, colors)
    _draw_curves(right, rows, metric, x_axis, labels, colors)
    if over_number and right.axison:
        right.legend(fontsize="small", ncols=1 + (len(rows) > 8))
    elif rows and right.axison:
        right.set_title("colors as on the left", fontsize="small")
    return figure


def _draw_curves(
    axes: "Axes", rows: list[Row], metric: str, x_axis: str, labels: list[str], colors: "list[Color]"
) -> None:
    from matplotlib.ticker import MaxNLocator

    for row, text, color in zip(rows, labels, colors, strict=True):
        label: str | None = text  # for the first line of the row only
        for job in row.jobs:
            epochs = RunFolder(job.folder).read_epochs() if job.status != "not started" else []
            points = [(e[X_AXES[x_axis]], e[metric]) for e in epochs if metric in e and X_AXES[x_axis] in e]
            if points:  # the extent of an empty line would make the axes narrow
                axes.plot(*zip(*points, strict=True), color=color, marker=".", linewidth=1, label=label, **_ON_TOP)
                label = None
    if rows and not axes.lines:
        axes.axis("off")
        axes.text(0.5, 0.5, f"no curves: metrics.csv has no {metric}", ha="center", transform=axes.transAxes)
        return
    axes.set_xlabel("epoch" if x_axis == "epochs" else "seconds of training")
    if x_axis == "epochs":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.set_ylim(_within_range(metric, axes.get_ylim()))


def _draw_over_number(axes: "Axes", rows: list[Row], metric: str, colors: "list[Color]") -> bool:
    """Draws ``metric`` over the varied key if there is only one and its values are numbers; returns whether it did."""
    from nin.data.overlays import escape

    try:
        numbers = [float(value) for row in rows for key, value in row.keys.items() if key != "run"]
    except ValueError:
        return False
    if len(rows) < 2 or len(numbers) != len(rows):
        return False
    points = sorted(zip(numbers, range(len(rows)), strict=True))
    x = [number for number, _ in points]
    axes.plot(x, [statistics.fmean(rows[i].values(metric)) for _, i in points], color="0.6", zorder=1)
    for number, i in points:
        _draw_seeds(axes, rows[i], metric, colors[i], number)
    axes.margins(x=0.16)  # for the number beside the last point
    axes.set_xlabel(escape(next(iter(rows[0].keys))))
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    if x[0] > 0 and x[-1] / x[0] >= 20:
        axes.set_xscale("log")
    if len(x) <= 6:
        axes.set_xticks(x, [f"{number:g}" for number in x])
        axes.set_xticks([], minor=True)
    axes.set_ylim(_within_range(metric, axes.get_ylim()))
    return True


def _draw_by_row(axes: "Axes", rows: list[Row], metric: str, labels: list[str], colors: "list[Color]") -> None:
    """Draws ``metric`` along the x axis, one row below the other, the best first."""
    for i, row in enumerate(rows):
        _draw_seeds(axes, row, metric, colors[i], i, along_x=True)
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(metric)
    axes.grid(axis="x", alpha=0.3)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlim(_within_range(metric, axes.get_xlim()))


def _within_range(metric: str, limits: tuple[float, float]) -> tuple[float, float]:
    """The ends of an axis: that of an accuracy shows nothing below 0 or above 1."""
    low, high = limits
    return (max(0, low), min(1, high)) if metric.endswith("acc") else limits


def _draw_seeds(axes: "Axes", row: Row, metric: str, color: "Color", place: float, along_x: bool = False) -> None:
    """Draws mean, sample standard deviation and single seeds at ``place`` on the axis that does not have the metric."""
    values, std = row.values(metric), row.summarize(metric)["std"]
    mean = statistics.fmean(values)
    seeds, point, offset, align, text = ([place] * len(values), values), (place, mean), (6, 6), "left", f"{mean:.4f}"
    if along_x:
        seeds, point, offset, align = seeds[::-1], point[::-1], (0, 6), "center"
        text += f" ± {std:.4f}" if std is not None else ""
    bars = (None, std) if along_x else (std, None)
    axes.errorbar(*point, *bars, color=color, capsize=4)  # y, then x
    axes.plot(*seeds, color=color, marker=".", linestyle="none", alpha=0.5, **_ON_TOP)
    axes.plot(*point, color=color, marker="o", **_ON_TOP)
    axes.annotate(text, point, offset, textcoords="offset points", fontsize="small", ha=align)


def draw_study(study: "optuna.Study", path: Path) -> None:
    """Optuna's own pictures, one after another in one file: history, importances, parallel coordinates."""
    from matplotlib import pyplot, rc_context
    from matplotlib.ticker import MaxNLocator
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.visualization import matplotlib as pictures
    from PIL import Image

    from nin.data.overlays import ignore_local_matplotlibrc

    ignore_local_matplotlibrc()
    evaluator = FanovaImportanceEvaluator(seed=0)
    plots = (
        lambda: pictures.plot_optimization_history(study, target_name="val/acc"),
        lambda: pictures.plot_param_importances(study, evaluator=evaluator, target_name="val/acc"),
        lambda: pictures.plot_parallel_coordinate(study, target_name="val/acc"),
    )
    parts = []
    pyplot.switch_backend("Agg")
    # Optuna's pictures are marked experimental, and change matplotlib's style.
    with warnings.catch_warnings(action="ignore"), rc_context():
        for place, plot in enumerate(plots):
            with contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError, IndexError):  # too few trials
                figure = plot().get_figure(root=True)
                assert figure is not None
                if place == 0:  # the history: trials are counted
                    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
                figure.set_size_inches(9, 5)
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
                parts.append(Image.open(buffer))
        pyplot.close("all")
    size = max((part.width for part in parts), default=1), sum(part.height for part in parts) or 1
    whole, top = Image.new("RGB", size, "white"), 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    with open_atomically(path) as file:
        whole.save(file, format="png")
