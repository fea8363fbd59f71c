"""A run on a folder of images that is killed, while it decodes or while it trains, ends with the same weights."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import ENVIRONMENT, GATED, SMALL, gated, merge, nin, outcome, run_experiment, wait_until
from nin.config.schema import Settings
from nin.runs.folder import RunFolder

RUN = (*SMALL, "data=folder", "data.batch_size=4", "data.image_size=28", "data.augment=flip_shift", "threads=1")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Large enough that several processes decode them."""
    draw = np.random.default_rng(0)
    for name, gray in (("dark", 60), ("light", 180)):
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for i in range(30):
            pixels = (gray + draw.integers(-50, 50, (160, 160, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


class Killed:
    """A process of Python that is killed at the end of the block, and the processes that it starts."""

    def __init__(self, *arguments: str, cwd: Path):
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env=ENVIRONMENT | GATED, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> "subprocess.Popen[str]":
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # not its children: they have to notice
        self.process.communicate()
        deadline = time.monotonic() + 60
        while _is_alive(self.process.pid):
            assert time.monotonic() < deadline, "processes that decode are left over"
            time.sleep(0.01)


def _is_alive(group: int) -> bool:
    """Whether any process of the group runs; one that has ended and waits for its parent does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(pgrp) == group and state != "Z":
            return True
    return False


def cache_folders(photos: Path) -> list[Path]:
    return [path for path in photos.with_name("photos.cache").glob(".new-*") if path.is_dir()]


@pytest.fixture
def expected(photos: Path, settings: Callable[..., Settings], tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The result of a run on the same images that nothing interrupts, with a cache of its own."""
    keys = (*RUN[len(SMALL) :], f"data.root={photos}", f"data.cache={tmp_path / 'other'}", "checkpoint.every_n_steps=1")
    chosen = settings(*(word for word in keys if not word.startswith("trainer")))
    return run_experiment(chosen, RunFolder(tmp_path / "whole"))


# What a run does first; the process ends neither by itself nor with a cache.
DECODE = """
import sys, time
from nin.config.composition import compose_settings
from nin.data import cache
if __name__ == "__main__":
    cache.require_unchanged = lambda *_: time.sleep(1000)
    cache.open_cache(compose_settings(sys.argv[1:]).data)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_killed_while_decoding_and_again_and_again_while_training(
    photos: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    gate, folder = tmp_path / "gate", tmp_path / "outputs/runs/killed"
    command = merge([*RUN, f"data.root={photos}", "checkpoint.every_n_steps=1", "name=killed", *gated(gate)])
    for _ in range(2):
        before = set(cache_folders(photos))
        with Killed("-c", DECODE, *command, cwd=tmp_path) as process:
            wait_until(lambda: any([*p.rglob("images.bin")] for p in {*cache_folders(photos)} - before), process)  # noqa: B023
        assert len(cache_folders(photos)) == 1  # left by the killed process; that of the one before is removed
    draw, last = random.Random(0), folder / "checkpoints/last.ckpt"
    for limit in range(2, 12, 2):
        gate.write_text(str(limit))
        before_it = last.stat().st_mtime_ns if last.exists() else 0
        with Killed("-m", "nin", "train", *command, cwd=tmp_path) as process:
            wait_until(lambda: last.exists() and last.stat().st_mtime_ns != before_it, process)  # noqa: B023
            time.sleep(draw.uniform(0, 0.05))
    assert cache_folders(photos) == []
    gate.write_text("1000")
    done = nin("train", *command, cwd=tmp_path, **GATED)
    assert done.returncode == 0, done.stderr
    assert "decoding" not in done.stderr
    assert "resuming from" in done.stdout
    result = json.loads((folder / "result.json").read_text())
    assert outcome(result) == outcome(expected)
    assert result["resumes"] == 5
