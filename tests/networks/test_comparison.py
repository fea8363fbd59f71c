import pytest
import torch

from nin import networks
from nin.config.composition import compose_config
from nin.config.validation import validate
from nin.networks.layers import first_fully_connected_weights, layers


@pytest.mark.parametrize(
    ("model", "fully_connected", "parameters"),
    # Dive into Deep Learning's networks, with one input channel and ten classes.
    [
        ("lenet", 48_000, 61_706),
        ("alexnet", 26_214_400, 46_764_746),
        ("vgg", 102_760_448, 128_806_154),
        ("nin", 0, 1_992_166),
    ],
)
def test_what_the_notebooks_compare(model: str, fully_connected: int, parameters: int) -> None:
    settings = validate(compose_config([f"model={model}"]))
    with torch.device("meta"):
        network = networks.build(settings)
        assert network(torch.zeros(2, 1, settings.data.image_size, settings.data.image_size)).shape == (2, 10)
    assert first_fully_connected_weights(network) == fully_connected
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_lenets_multiply_adds_by_hand() -> None:
    with torch.device("meta"):
        rows = layers(networks.build(validate(compose_config(["model=lenet"]))), in_channels=1, image_size=28)
    convolutions = [28 * 28 * 6 * 25, 10 * 10 * 16 * 6 * 25]
    connected = [400 * 120, 120 * 84, 84 * 10]
    assert [row.multiply_adds for row in rows if row.multiply_adds] == convolutions + connected
    assert rows[-1].receptive_field == 28
