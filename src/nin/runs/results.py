"""Prints results to the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nin.runs.console import format_path, tensorboard_command
from nin.runs.folder import RunFolder


def print_result(folder: RunFolder, result: dict[str, Any]) -> None:
    """Prints the result of a finished run, its folder, and the command that opens TensorBoard on the runs around it."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    for name in ("test/acc", "test/loss", "val/acc", "val/loss"):
        if result["metrics"][name] is not None:
            table.add_row(name, f"{result['metrics'][name]:.4f}")
    if tested := result.get("best_weights_sha256"):
        table.add_row("tested weights" if result["metrics"]["test/acc"] is not None else "best weights", tested[:16])
    table.add_row("epochs, steps", f"{result['epochs']}, {result['steps']}")
    table.add_row("training", f"{result['train_seconds']:.0f} s, {result['images_per_second'] or 0:,.0f} images/s")
    table.add_row("parameters", f"{result['parameters']:,}")
    table.add_row("weights", result["weights_sha256"][:16])
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    print(f"run folder: {format_path(folder.path)}")
    if folder.event_files():
        print(f"curves:     {tensorboard_command(folder.path.parent)}")


def print_test(metrics: dict[str, Any], confusion: Any) -> None:
    """Prints test accuracy and loss, and the confusion matrix with the accuracy per class.

    Args:
        confusion: an integer matrix, ``(classes, classes)``: rows are true classes, columns predicted classes.
    """
    print(f"test/acc  {metrics['test/acc']}\ntest/loss {metrics['test/loss']}")
    table = Table(title="true class (rows), predicted class (columns)", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    table.add_column("accuracy", justify="right", style="bold")
    for name in metrics["test/acc_by_class"]:
        table.add_column(name[:7], justify="right")
    for (name, acc), row in zip(metrics["test/acc_by_class"].items(), confusion.tolist(), strict=True):
        table.add_row(name, "-" if acc is None else f"{acc:.4f}", *(str(count) if count else "·" for count in row))
    console = Console()
    Console(width=max(console.width, 120), highlight=False).print(table)
