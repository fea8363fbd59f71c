"""``nin bench [overrides]``: images per second, compared with the notebooks' loop and a matrix product, in one run."""

import argparse
import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from nin.commands.options import add_config_options, expand_path
from nin.config.composition import compose_settings
from nin.config.errors import read_first_line
from nin.config.hydra_options import open_hydra
from nin.config.keys import split_override
from nin.config.schema import OwnData, Settings, UserError, is_single_process
from nin.data.sources import prepare
from nin.runs.console import Console, format_path, log_to, open_progress
from nin.runs.files import write_atomically
from nin.runs.imports import lightning_imports
from nin.runs.versions import read_versions
from nin.system.devices import require_accelerator
from nin.system.processes import StoppedError

if TYPE_CHECKING:
    from nin.bench.project import Report

log = logging.getLogger(__name__)

# Only training is measured; data=garments needs no download and has images as large as Fashion-MNIST's.
_DEFAULTS = ["data=garments", "schedule=constant"]
# Training ends when all rounds are measured.
_FIXED = [
    "trainer.max_epochs=1000000", "trainer.max_steps=-1", "trainer.max_time=null", "trainer.fast_dev_run=false",
    "trainer.min_epochs=null", "trainer.min_steps=null", "trainer.limit_val_batches=0",
]  # fmt: skip


def main(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    with open_hydra(args.config_dir, args.config_path, args.overrides):
        settings = compose_bench_settings(args.overrides, args.config_name)
    if not is_single_process(settings.trainer):
        raise UserError("trainer: nin bench runs in one process; leave out trainer=ddp and trainer.devices")
    if isinstance(settings.data, OwnData):
        raise UserError("data: nin bench measures this project's own data modules; choose data=garments")
    require_accelerator(settings.trainer)
    prepare(settings.data)
    stderr_console = Console(stderr=True)
    try:
        with show_progress(stderr_console) as progress:
            progress("loading torch and Lightning …", "", 0, None)
            with lightning_imports():
                import lightning  # noqa: F401  # what imports it later finds it loaded

            with log_to(None):
                results = run_benchmarks(settings, args.seconds, args.rounds, progress)
    except StoppedError as stopped:
        stderr_console.print(f"{stopped}; nothing is written")
        return stopped.exit_status
    out = args.out or Path("outputs/bench") / time.strftime("%Y-%m-%d_%H-%M-%S.json")
    try:
        write_atomically(out, json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"{format_path(out)}: can't be written ({error.strerror}); give another path with --out"
        ) from error
    finally:
        print_results(results)
    print(f"written: {format_path(out)}")
    return 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nin bench",
        description="Measure images per second of training for a minute and a half, alternating with the notebooks' "
        "loop and with matrix products, so that the ratios hold while other programs use the machine. The results are "
        "written as JSON.",
        epilog="example: nin bench model=nin_small data.batch_size=256 trainer=cpu",
        allow_abbrev=False,
    )
    parser.add_argument(
        "overrides", nargs="*", help="key=value as for nin train: model, data.batch_size, trainer.precision, …"
    )
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each measurement; default: 4")
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of rounds, whose medians are reported; default: 3"
    )
    parser.add_argument("--out", type=expand_path, help="the JSON file; default: outputs/bench/<time>.json")
    add_config_options(parser)
    args = parser.parse_intermixed_args(arguments)  # overrides may follow an option
    if args.rounds < 1:
        raise UserError(f"--rounds={args.rounds}: must be 1 or more")
    if not 0 < args.seconds < float("inf"):
        raise UserError(f"--seconds={args.seconds:g}: must be a number above 0")
    return args


def compose_bench_settings(overrides: list[str], config_name: str = "train") -> Settings:
    """The settings that are measured: those of ``nin train`` with other defaults.

    Raises:
        UserError: lists every error in the overrides, or names a key that the measurement itself sets.
    """
    given = {split_override(word)[0] for word in overrides}
    if fixed := sorted(given & {split_override(word)[0] for word in _FIXED}):
        raise UserError(f"{fixed[0]}: nin bench sets it, and ends after --rounds measurements; leave it out")
    defaults = [word for word in _DEFAULTS if split_override(word)[0] not in given]
    if compose_settings(overrides, config_name).data.name != "fashion_mnist":
        defaults = [word for word in defaults if not word.startswith("data=")]  # an experiment has chosen other images
    return compose_settings([*defaults, *_FIXED, *overrides], config_name)


@contextlib.contextmanager
def show_progress(console: Console) -> Iterator["Report"]:
    """Yields the function that is called before each measurement: on a terminal a bar, elsewhere a line per part."""
    if not console.is_terminal:
        printed = ""

        def print_line(line: str, what: str, done: int, total: int | None) -> None:
            nonlocal printed
            if line != printed:
                console.print(line)
            printed = line

        yield print_line
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with open_progress(console, *columns) as bar:
        task = bar.add_task("", total=None)

        def show(line: str, what: str, done: int, total: int | None) -> None:
            bar.update(task, description=f"{line}: {what}" if what else line, completed=done, total=total)

        yield show


def run_benchmarks(settings: Settings, seconds: float, rounds: int, progress: "Report") -> dict[str, Any]:
    """Runs all measurements and returns their results as plain values."""
    from nin.bench.memory import measure_memory
    from nin.bench.overhead import measure_overhead
    from nin.bench.turns import count_operations, measure_rates
    from nin.deploy.export import measure_untrained
    from nin.networks.build import require_buildable
    from nin.system.devices import describe_device, require_working_gpu, set_threads
    from nin.training.trainer import build_trainer

    require_buildable(settings)
    trainer = build_trainer(settings, None, [])
    device = trainer.strategy.root_device
    require_working_gpu(device)
    set_threads(settings)
    more = {}
    try:
        more["export"] = measure_untrained(settings, seconds)
    except Exception as error:  # noqa: BLE001  # of the exporter, about a network of the user's own
        log.warning("the export is left out: %s", read_first_line(error))
    sizes = [max(1, settings.data.batch_size // n) for n in (4, 2, 1)]
    return {
        "device": describe_device(device),
        "precision": str(trainer.precision),
        "versions": read_versions(),
        "settings": settings.model_dump(mode="json"),
        "operations": count_operations(settings),
        "rates": measure_rates(settings, seconds, rounds, progress, more),
        "milliseconds_per_step": measure_overhead(settings, rounds, progress),
        "memory": {size: measure_memory(settings, size, progress) for size in dict.fromkeys(sizes)},
    }


def print_results(results: dict[str, Any]) -> None:
    """Prints what `run_benchmarks` returns: rates, overhead and memory."""
    console = Console()
    rates = results["rates"]
    console.print(_rates_table(results))
    console.print(
        f"limit: {rates['matrix product'] / 1e9:,.0f} GFLOP/s in a large matrix product of the same precision"
    )
    percent = 100 * rates["training"] / rates["data"]
    console.print(f"data: taking and resizing the images is {percent:.1f} percent of a training step\n")
    console.print(_overhead_table(results["milliseconds_per_step"]))
    console.print(_memory_table(results["memory"]))
    console.print(
        "Weights, gradients and the optimizer's state do not depend on the batch size. The activations that each layer "
        "keeps for the backward pass grow with it; micro-batches (speed.micro_batch) keep them small.\n"
    )


def _rates_table(results: dict[str, Any]) -> Table:
    rates, operations = results["rates"], results["operations"]
    model, data = results["settings"]["model"], results["settings"]["data"]
    size = f"{data['image_size']}x{data['image_size']}"
    title = f"{model.get('name', model.get('_target_'))} at {size}, batch {data['batch_size']}, {results['device']}"
    table = Table("", title=title, title_justify="left")
    for column in ("images/s", "× notebooks", "GFLOP per image", "of the limit"):
        table.add_column(column, justify="right")
    for row, name, flop in (
        ("nin train", "training", operations["training"]),
        ("the notebooks' loop", "notebooks", operations["training"]),
        ("scoring (nin eval)", "scoring", operations["scoring"]),
        # By onnxruntime on the CPU, with the resizing.
        ("export (model.onnx)", "export", operations["scoring"] if results["device"].startswith("cpu") else None),
        ("data only", "data", None),
    ):
        if name not in rates:
            continue
        # The notebooks' loop and the export compute in float32, for which a limit in bfloat16 is too high.
        has_limit = flop and (results["precision"].startswith("32") or name in ("training", "scoring"))
        share = f"{rates[name] * flop / rates['matrix product']:.2f}" if has_limit else ""
        ratio = f"{rates[name] / rates['notebooks']:.2f}" if name not in ("scoring", "export") else ""
        table.add_row(row, f"{rates[name]:,.1f}", ratio, f"{flop / 1e9:.3g}" if flop else "", share)
    return table


def _overhead_table(milliseconds: dict[str, float]) -> Table:
    title = "overhead: a step on a linear network, 32 images"
    table = Table("", title=title, title_justify="left")
    for column in ("ms", "more than the bare Trainer"):
        table.add_column(column, justify="right")
    for name, value in milliseconds.items():
        table.add_row(name, f"{value:.2f}", f"{value - milliseconds['bare Trainer']:+.2f}")
    return table


def _memory_table(memory: dict[int, dict[str, int]]) -> Table:
    # Narrow enough for 80 columns.
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(
        "batch", title="memory of a training step, and peak of the process, MiB", title_justify="left", **style
    )
    for column in ("weights", "gradients", "optimizer", "activations", "without micro-batches", "peak"):
        table.add_column(column, justify="right")
    for batch_size, parts in memory.items():
        table.add_row(str(batch_size), *(f"{value / 2**20:,.1f}" for value in parts.values()))
    return table
