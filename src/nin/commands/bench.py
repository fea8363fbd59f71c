"""``nin bench [overrides]``: images a second, beside the notebooks' own loop and the machine's limit, in one run."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nin.config.composition import compose_settings
from nin.config.schema import Settings, UserError, is_single_process
from nin.data.sources import prepare
from nin.runs.console import log_to
from nin.runs.folder import write_atomically
from nin.runs.results import shown
from nin.system.devices import require_accelerator
from nin.system.signals import StoppedError

# What is measured is training; garments need no download and are as large as Fashion-MNIST's images.
_UNLESS_ASKED = ["data=garments", "trainer.max_epochs=1000", "trainer.limit_val_batches=0", "schedule=constant"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="nin bench",
        description="Trains for a minute and a half, in turns with the notebooks' loop and with matrix products, so "
        "that the ratios hold on a machine that does other things too. Writes what it finds as JSON.",
        epilog="example: nin bench model=nin_small data.batch_size=256 trainer=cpu",
    )
    parser.add_argument("overrides", nargs="*", help="key=value as for nin train: model, size, batch, precision, …")
    parser.add_argument("--seconds", type=float, default=4, help="of each turn; default: 4")
    parser.add_argument("--rounds", type=int, default=3, help="of turns; rates are their medians; default: 3")
    parser.add_argument("--out", type=Path, help="the JSON file; default: outputs/bench/<time>.json")
    asked = parser.parse_args(arguments)
    if asked.rounds < 1 or asked.seconds <= 0:
        raise UserError("--rounds and --seconds: must be above 0")
    settings = compose_settings([*_UNLESS_ASKED, *asked.overrides])
    if not is_single_process(settings.trainer):
        raise UserError("trainer: a bench is of one process; leave out trainer=ddp and trainer.devices")
    require_accelerator(settings.trainer)
    prepare(settings.data)
    told = Console(stderr=True, highlight=False).print
    told("loading torch and Lightning …")
    try:
        with log_to(None):
            found = measured(settings, asked.seconds, asked.rounds, told)
    except StoppedError as stopped:
        told(f"{stopped}; nothing is written")
        return stopped.exit_status
    show(found)
    out = asked.out or Path("outputs/bench") / time.strftime("%Y-%m-%d_%H-%M-%S.json")
    write_atomically(out, json.dumps(found, indent=2) + "\n")
    print(f"written: {shown(out)}")
    return 0


def measured(settings: Settings, seconds: float, rounds: int, told: Any) -> dict[str, Any]:
    from nin.bench import memory, overhead, turns
    from nin.system.devices import set_threads
    from nin.training.experiment import build_trainer, device_name
    from nin.training.run import versions

    set_threads(settings)
    sizes = [max(1, settings.data.batch_size // n) for n in (4, 2, 1)]
    return {
        "device": device_name(build_trainer(settings, None, []).strategy.root_device),
        "versions": versions(),
        "settings": settings.model_dump(mode="json"),
        "operations": turns.operations(settings),
        "rates": turns.training(settings, seconds, rounds, told),
        "milliseconds_a_step": overhead.overhead(settings, rounds, told),
        "memory": {size: memory.memory(settings, size, told) for size in dict.fromkeys(sizes)},
    }


def show(found: dict[str, Any]) -> None:
    rates, operations = found["rates"], found["operations"]
    chosen, data = found["settings"]["model"], found["settings"]["data"]
    limit = rates["matrix product"]
    console = Console(highlight=False)
    console.width = max(console.width, 110)
    size = f"{data['image_size']}x{data['image_size']}"
    title = f"{chosen['name']} at {size}, batch {data['batch_size']}, {found['device']}"
    table = Table("", title=title, title_justify="left")
    for column in ("images/s", "× notebooks", "GFLOP an image", "of the limit"):
        table.add_column(column, justify="right")
    for row, name, flop in (
        ("nin train", "training", operations["training"]),
        ("the notebooks' loop", "notebooks", operations["training"]),
        ("scoring (nin eval)", "scoring", operations["scoring"]),
        ("data alone", "data", None),
    ):
        share = [f"{flop / 1e9:.3g}", f"{rates[name] * flop / limit:.2f}"] if flop else ["", ""]
        compared = f"{rates[name] / rates['notebooks']:.2f}" if row != "scoring (nin eval)" else ""
        table.add_row(row, f"{rates[name]:,.1f}", compared, *share)
    console.print(table)
    console.print(f"the limit: {limit / 1e9:,.0f} GFLOP/s in a large matrix product of the same precision")
    console.print(f"data: {100 * rates['training'] / rates['data']:.1f} percent of a training step\n")

    table = Table("a step on a linear network, 32 images", title="besides the network", title_justify="left")
    for column in ("ms", "more than the bare Trainer"):
        table.add_column(column, justify="right")
    steps = found["milliseconds_a_step"]
    for name, milliseconds in steps.items():
        table.add_row(name, f"{milliseconds:.2f}", f"{milliseconds - steps['bare Trainer']:+.2f}")
    console.print(table)

    table = Table("batch", title="memory of a training step, MiB", title_justify="left")
    columns = ("weights", "gradients", "optimiser", "activations", "the same uncut", "peak of the process")
    for column in columns:
        table.add_column(column, justify="right")
    for batch, parts in found["memory"].items():
        table.add_row(str(batch), *(f"{value / 2**20:,.1f}" for value in parts.values()))
    console.print(table)
    console.print(
        "Weights, gradients and the optimiser's state do not hang on the batch; what each layer keeps for the backward "
        "pass grows with it,\nand is what micro_batch of the batch (speed.micro_batch) keep small.\n"
    )
