"""Networks of the project are found by their name, tried without computing anything, and added with two files."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nin
from helpers import ENVIRONMENT
from nin.config.composition import compose_config, compose_settings
from nin.config.hydra_options import open_hydra
from nin.config.networks import NETWORKS
from nin.config.schema import CONF, UserError
from nin.networks.build import build_network, require_buildable
from nin.runs.folder import RunFolder
from nin.training.request import RunRequest
from nin.training.run import execute_run


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        require_buildable(compose_settings(list(overrides)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "smallest"),
    # By hand: the output size of a convolution or pooling, floor((n + 2p - k) / s) + 1, solved for n, from 1 backward.
    [
        ("model=nin", 67),
        ("model=nin model.first_padding=1", 65),
        ("model=nin_small", 11),
        ("model=lenet", 12),
        ("model=alexnet", 65),
        ("model=vgg", 32),
    ],
)
def test_the_smallest_image_size_is_found_by_trying(model: str, smallest: int) -> None:
    chosen = f"needs at least {smallest} pixels per side; choose data.image_size={smallest} or more"
    for too_small in (1, smallest - 1):
        assert chosen in refused(*model.split(), f"data.image_size={too_small}")
    settings = compose_settings([*model.split(), f"data.image_size={smallest}"])
    state = torch.get_rng_state()
    require_buildable(settings)
    assert torch.equal(torch.get_rng_state(), state)  # the initial weights are those of a network that was not tried
    with torch.device("meta"):
        assert build_network(settings, 3, 7)(torch.zeros(2, 3, smallest, smallest)).shape == (2, 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image_size=40", "or more, or model=nin_small, which is made for 28"),
        ("model.first_stride=1024", "model: nin needs images of more than 1024 pixels per side, which is the maximum"),
        ("model.widths=[[96,96],256,384]", "model: widths has [96, 96] for a block of 3 layers"),
        ("model.widths=[96,256]", "model: kernel_sizes has 4 entries and widths 2"),
        (
            "model.kernel_sizes=[11,4,3,3]",
            "model: kernel_sizes=[11, 4, 3, 3]: 4 is even; all but the first must be odd",
        ),
        ("model.first_padding=1000", "model: first_padding=1000: must be less than the first kernel size, 11"),
    ],
)
def test_arguments_that_do_not_fit_each_other(override: str, message: str) -> None:
    assert message in refused("data.image_size=224" if "image_size" not in override else override, override)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("_target_: nowhere.Net", r"^model\._target_=nowhere\.Net: can't be imported \("),
        (
            "_target_: torch.nn.Flatten\nstart: 1",
            r"^model\.start: torch\.nn\.Flatten has no such argument; did you mean start_dim\?",
        ),
    ],
)
def test_a_class_that_can_not_be_used_is_named_before_data_are_prepared(
    tmp_path: Path, section: str, message: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(f"{section}\ninput_size: 28\n")
    with open_hydra(str(tmp_path)):
        settings = compose_settings(["model=mine", "data=garments", f"data.root={tmp_path / 'data'}", "trainer=cpu"])
    with pytest.raises(UserError, match=message):
        execute_run(RunRequest(settings, RunFolder(tmp_path / "run")))
    assert not (tmp_path / "data").exists()


def test_every_network_has_a_yaml_file_of_its_name() -> None:
    for name, section in NETWORKS.items():
        config = compose_config([f"model={name}"]).model
        assert config.name == name
        assert set(config) == set(section.model_fields)


TINY = """
from typing import Literal

from torch import nn

from nin.config.types import Width
from nin.networks.sequential import Network


class Tiny(Network):
    def __init__(self, in_channels: int, num_classes: int, image_size: int, width: Width, end: Literal["mean", "max"]):
        pool = nn.AdaptiveAvgPool2d(1) if end == "mean" else nn.AdaptiveMaxPool2d(1)
        super().__init__(nn.Conv2d(in_channels, width, 5), nn.ReLU(), pool, nn.Flatten(), nn.Linear(width, num_classes))
"""


@pytest.mark.long
def test_a_network_is_added_with_two_files(tmp_path: Path) -> None:
    package = tmp_path / "nin"
    shutil.copytree(Path(nin.__file__).parent, package)
    shutil.copytree(CONF, package / "conf", dirs_exist_ok=True)  # an installed package has it already
    (package / "networks" / "tiny.py").write_text(TINY)
    (package / "conf" / "model" / "tiny.yaml").write_text(
        "name: tiny\ninput_size: 28\nwidth: 4\nend: mean\ninit: torch\n"
    )

    commands = [[], ["model.widht=3", "model.end=min", "model.width=0"], ["data.image_size=4"]]
    script = f"from nin import cli\nfor words in {commands}:\n    print(cli.run('inspect', ['model=tiny', *words]))"
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path), "COLUMNS": "100"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert "tiny at 28x28" in run.stdout, run.stderr
    assert "4 x 24 x 24" in run.stdout
    assert run.stdout.split()[-3:] == ["0", "2", "2"]
    *wrong, too_small = run.stderr.splitlines()
    assert wrong == [
        "nin inspect: 3 errors",
        "  model.widht=3: no such key; did you mean model.width? There are: name, input_size, width, end, init",
        "  model.width=0: must be greater than or equal to 1",
        "  model.end=\"min\": must be 'mean' or 'max'",
    ]
    assert "tiny needs at least 5 pixels per side" in too_small
