"""Prints results to the terminal."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nin.config.errors import printable
from nin.runs.console import Console, format_path, tensorboard_command
from nin.runs.folder import RunFolder
from nin.runs.versions import describe_changed_code

# The metrics of `print_result`.
PRINTED = ("test/acc", "test/top5_acc", "test/loss", "val/acc", "val/loss")

_MATRIX_CLASSES = 12  # as many columns as 120 characters have room for
_LISTED_CLASSES = 30
_ENOUGH_IMAGES = 20  # a class with fewer images may be predicted for none by chance


def print_finished(folder: RunFolder, result: dict[str, Any], others: str, label: str, is_job: bool) -> None:
    """Prints that a requested run is finished already, and its result; of a job of a sweep in one line.

    Args:
        others: what its result was computed with, if something else is requested now.
        label: a prefix of what is printed, where several runs print at the same time.
    """
    if is_job:
        metrics = [f"{name} {value:.4f}" for name in PRINTED if (value := result["metrics"].get(name)) is not None]
        print(f"{label}finished before{others}: {', '.join(metrics)}", flush=True)
        if changed := describe_changed_code(result):
            print(f"{label}WARNING: {changed}", flush=True)
        return
    advice = "to train again, give nin train another name=…, or remove the folder"
    print(f"{format_path(folder.path)} is finished{others}; {advice}")
    if changed := describe_changed_code(result):
        print(f"WARNING: {changed}")
    print_result(folder, result)


def print_result(folder: RunFolder, result: dict[str, Any], label: str = "") -> None:
    """Prints the result of a finished run, its folder, and the command that opens TensorBoard on the runs around it."""
    if label:
        print(f"{label}{result['status']}:", flush=True)
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    for name in PRINTED:
        if result["metrics"].get(name) is not None:
            table.add_row(name, f"{result['metrics'][name]:.4f}")
    if worst := _find_worst_class(result["metrics"]):
        table.add_row("worst class", worst)
    if isinstance(images := result.get("test_images"), int):
        table.add_row("test images", f"{images:,}")
    if tested := result.get("best_weights_sha256"):
        table.add_row(
            "tested weights" if result["metrics"].get("test/acc") is not None else "best weights",
            printable(tested[:16]),
        )
    table.add_row("epochs, steps", f"{result['epochs']}, {result['steps']}")
    table.add_row("training", f"{result['train_seconds']:.0f} s, {result.get('images_per_second') or 0:,.0f} images/s")
    table.add_row("parameters", f"{result['parameters']:,}")
    table.add_row("weights", printable(result["weights_sha256"][:16]))
    console = Console(soft_wrap=True)
    console.print(table)
    curves = f"\ncurves:     {tensorboard_command(folder.path.resolve().parent)}" if folder.event_files() else ""
    print(f"run folder: {format_path(folder.path)}{curves}", flush=True)  # several processes may share the terminal


def print_test(metrics: dict[str, Any], confusion: Any) -> None:
    """Prints test accuracy and loss, the worst class, and the accuracy per class with what it is confused with.

    Args:
        confusion: an integer matrix, ``(classes, classes)``: rows are true classes, columns predicted classes.
    """
    print(f"test/acc  {metrics['test/acc']:.4f}\ntest/loss {metrics['test/loss']:.4f}")
    if "test/top5_acc" in metrics:  # with many classes
        print(f"test/top5_acc {metrics['test/top5_acc']:.4f}")
    print(f"{int(confusion.sum()):,} test images; lowest accuracy of a class: {_find_worst_class(metrics)}")
    names = [printable(name) for name in metrics["test/acc_by_class"]]
    accuracies = list(metrics["test/acc_by_class"].values())
    table = _confusion_matrix if len(names) <= _MATRIX_CLASSES else _confused_classes
    shown, width = table(names, accuracies, confusion.tolist()), max(Console().width, 120)
    console = Console(width=width)
    title, shown.title = shown.title, None  # rich would wrap it at the width of a small table
    console.print(title, shown, sep="\n")
    if missing := never_predicted(names, confusion):
        console.print(f"never predicted: {', '.join(missing)}", soft_wrap=True)


def _find_worst_class(metrics: dict[str, Any]) -> str | None:
    """The class with the lowest test accuracy, and that accuracy; None if the result, of a file, has none."""
    by_class = metrics.get("test/acc_by_class")
    tested = [(acc, name) for name, acc in by_class.items() if acc is not None] if isinstance(by_class, dict) else []
    if not tested or not all(isinstance(acc, int | float) for acc, _ in tested):
        return None
    acc, name = min(tested, key=lambda entry: entry[0])
    return f"{printable(name)} {acc:.4f}"


def never_predicted(names: Sequence[str], confusion: Any) -> list[str]:
    """The classes with at least 20 test images that the network predicts for no image at all.

    Args:
        confusion: as in `print_test`.
    """
    counts = zip(names, confusion.sum(1).tolist(), confusion.sum(0).tolist(), strict=True)
    return [name for name, images, predicted in counts if images >= _ENOUGH_IMAGES and not predicted]


def _confusion_matrix(names: list[str], accuracies: list[float | None], confusion: list[list[int]]) -> Table:
    table = Table(title="true class (rows), predicted class (columns)", box=None, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("accuracy", justify="right", style="bold")
    for i in range(len(names)):  # numbers: so many names don't fit
        table.add_column(str(i), justify="right")
    for i, (name, acc, row) in enumerate(zip(names, accuracies, confusion, strict=True)):
        table.add_row(Text(f"{i} {name}"), _format(acc), *(str(count) if count else "·" for count in row))
    return table


def _confused_classes(names: list[str], accuracies: list[float | None], confusion: list[list[int]]) -> Table:
    """The classes with the lowest accuracy, one per line: a matrix of so many classes does not fit a terminal."""
    tested = [i for i, acc in enumerate(accuracies) if acc is not None]
    worst = sorted(tested, key=lambda i: accuracies[i] or 0.0)[:_LISTED_CLASSES]
    title = f"the {len(worst)} of {len(names)} classes with the lowest accuracy"
    table = Table(title=title, box=box.SIMPLE)
    for column in ("class", "accuracy", "images", "most often predicted instead"):
        table.add_column(column, justify="right" if column in ("accuracy", "images") else "left")
    for i in worst:
        others = [0 if j == i else count for j, count in enumerate(confusion[i])]
        wrong = f"{names[others.index(max(others))]} ({max(others)})" if any(others) else ""
        table.add_row(Text(names[i]), _format(accuracies[i]), str(sum(confusion[i])), Text(wrong))
    return table


def _format(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.4f}"
