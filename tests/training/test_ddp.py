"""Runs in two processes that Lightning starts: how they end."""

import signal
from pathlib import Path

import pytest

from helpers import GATED, SMALL, gated, start, wait_for

pytestmark = pytest.mark.long
TWO = [
    *SMALL,
    "trainer.strategy=ddp",
    "trainer.devices=2",
    "callbacks=none",
    "logger=none",
    "checkpoint.every_n_steps=1",
]


def test_a_run_that_is_stopped_reports_its_checkpoint_however_long_that_takes(tmp_path: Path, data_root: Path) -> None:
    gate = tmp_path / "gate"
    gate.write_text("3")
    words = ["train", *TWO, "name=two", *gated(gate), "+callbacks.slow={_target_: gate.SlowEnd}"]
    process = start(*words, cwd=tmp_path, NIN_DATA=str(data_root), OMP_NUM_THREADS="1", **GATED)
    wait_for(tmp_path / "outputs" / "runs" / "two" / "checkpoints" / "last-2.ckpt", process)
    process.send_signal(signal.SIGTERM)
    gate.write_text("1000")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    assert "stopped by SIGTERM; last.ckpt is saved; resume with: " in output


def test_a_process_that_fails_ends_the_others_of_its_run(tmp_path: Path, data_root: Path) -> None:
    words = ["train", *TWO, "name=two", "+callbacks.failing={_target_: gate.FailingRank}"]
    process = start(*words, cwd=tmp_path, NIN_DATA=str(data_root), OMP_NUM_THREADS="1", **GATED)
    output = process.communicate(timeout=120)[0]  # until the last process has ended, which has the same output
    assert process.returncode == 1, output
    assert "No space left on device" in output
