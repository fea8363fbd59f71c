"""``nin inspect [overrides]``: the chosen network's layers, and what NiN saves against LeNet, AlexNet and VGG.

Of a network of the user's own, its modules.
"""

import argparse
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from nin.commands.options import add_config_options
from nin.config.composition import compose_settings
from nin.config.hydra_options import open_hydra
from nin.config.networks import OwnModel
from nin.config.schema import Settings
from nin.data.sources import describe
from nin.runs.console import Console

if TYPE_CHECKING:
    from torch import nn

_WIDTH = 80  # characters, in which both tables fit
_STYLE: dict[str, Any] = {"title_justify": "left", "box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="nin inspect",
        allow_abbrev=False,
        description="Print a network without training it: each layer's output shape, parameters, multiply-adds and "
        "receptive field, and what NiN saves against the networks with fully connected layers.",
        epilog="examples: nin inspect; nin inspect model=nin_small; nin inspect model.conv1x1_layers=0",
    )
    parser.add_argument("overrides", nargs="*", help="key=value and group=option as for nin train: model, data, …")
    add_config_options(parser)
    args = parser.parse_intermixed_args(arguments)  # overrides may follow an option
    with open_hydra(args.config_dir, args.config_path, args.overrides):
        settings = compose_settings(args.overrides, args.config_name)
    console = Console()
    console.width = max(console.width, _WIDTH)  # rich would cut numbers off in a narrower terminal
    console.print(_layers_table(settings))
    if isinstance(settings.model, OwnModel):
        console.print("The receptive field is not known of a network of your own.", soft_wrap=True)
        return
    console.print("receptive field: pixels per side on which one output value can depend\n", soft_wrap=True)
    console.print(_comparison_table())


def _layers_table(settings: Settings) -> Table:
    from nin.networks.layers import describe_layers, find_receptive_fields

    size = settings.data.image_size
    network = _build(settings)
    # In a class of the user's own the operations are counted; how it connects them is not known.
    is_own = isinstance(settings.model, OwnModel)
    rows = describe_layers(network, describe(settings.data).channels, size, is_own)
    table = Table(title=f"{settings.model.name} at {size}x{size}", **_STYLE)
    for column in ("layer", "output shape", "parameters", "multiply-adds", *([] if is_own else ["receptive field"])):
        table.add_column(column, justify="left" if column == "layer" else "right")
    fields = [[]] * len(rows) if is_own else [[str(field)] for field in find_receptive_fields(network, size)]
    for row, field in zip(rows, fields, strict=True):
        shape = " x ".join(map(str, row.output_shape)) or "-"
        counts = (f"{n:,}" if n else "" for n in (row.parameters, row.multiply_adds))
        table.add_row(row.name, shape, *counts, *field)
    table.add_section()
    total = (sum(row.parameters for row in rows), sum(row.multiply_adds for row in rows))
    table.add_row("total", "", *(f"{n:,}" for n in total))
    return table


def _build(settings: Settings) -> "nn.Sequential":
    from nin.networks.build import build_network, counting_device, require_buildable

    require_buildable(settings)
    data = describe(settings.data)
    with counting_device(settings.model):
        return build_network(settings, data.channels, len(data.class_names))


def _comparison_table() -> Table:
    from nin.networks.layers import describe_layers, first_fully_connected_weights

    table = Table(title="first fully connected layer after the convolutions, by default", **_STYLE)
    for column in ("network", "input", "weights", "total parameters", "multiply-adds"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name in ("lenet", "alexnet", "vgg", "nin"):
        settings = compose_settings([f"model={name}"])
        network, size = _build(settings), settings.data.image_size
        counts = (
            first_fully_connected_weights(network),
            sum(p.numel() for p in network.parameters()),
            sum(row.multiply_adds for row in describe_layers(network, describe(settings.data).channels, size)),
        )
        table.add_row(name, f"{size}x{size}", *(f"{n:,}" if n else "none" for n in counts))
    return table
