"""``nin inspect [overrides]``: the chosen network's layers, and what NiN saves against LeNet, AlexNet and VGG."""

from rich.console import Console
from rich.table import Table

from nin.config.composition import compose_config, compose_settings
from nin.config.validation import validate

HELP = """Usage: nin inspect [group=option …] [key=value …]

The network without training it: each layer's output shape, parameters, multiply-adds and receptive field, and what
NiN saves against the networks with fully connected layers. Keys and groups are those of nin train.

  nin inspect                         the notebooks' network at 224x224
  nin inspect model=nin_small         the one for 28x28
  nin inspect model.conv1x1_layers=0  without its 1x1 convolutions"""


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    settings = compose_settings(arguments)
    import torch

    from nin import networks
    from nin.networks.layers import first_fully_connected_weights, layers

    console = Console()
    size = settings.data.image_size
    with torch.device("meta"):
        chosen = networks.build(settings)
    rows = layers(chosen, in_channels=1, image_size=size)
    table = Table(title=f"{settings.model.name} at {size}x{size}", title_justify="left")
    for column in ("layer", "output shape", "parameters", "multiply-adds", "sees"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in rows:
        shape = " x ".join(map(str, row.output_shape))
        counts = (f"{n:,}" if n else "" for n in (row.parameters, row.multiply_adds))
        table.add_row(row.name, shape, *counts, f"{row.receptive_field} px")
    table.add_section()
    total = (sum(row.parameters for row in rows), sum(row.multiply_adds for row in rows))
    table.add_row("all", "", *(f"{n:,}" for n in total), "")
    console.print(table)

    table = Table(title="the first fully connected layer behind the convolutions", title_justify="left")
    for column in ("network", "input", "its weights", "all parameters", "multiply-adds"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name in ("lenet", "alexnet", "vgg", "nin"):
        other = validate(compose_config([f"model={name}"]))
        size = other.data.image_size
        with torch.device("meta"):
            built = networks.build(other)
        counts = (
            first_fully_connected_weights(built),
            sum(p.numel() for p in built.parameters()),
            sum(row.multiply_adds for row in layers(built, 1, size)),
        )
        table.add_row(name, f"{size}x{size}", *(f"{n:,}" if n else "none" for n in counts))
    console.print(table)
