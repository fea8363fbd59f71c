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


def test_each_process_draws_other_masks_for_dropout_also_after_a_resumption(tmp_path: Path, data_root: Path) -> None:
    words = [
        "train",
        *TWO,
        "name=two",
        "model.dropout=0.5",
        f"+callbacks.draws={{_target_: gate.Draws, path: {tmp_path}/draws}}",
    ]
    words += ["schedule=constant"]
    for epochs in (1, 2):
        process = start(*words, f"trainer.max_epochs={epochs}", cwd=tmp_path, NIN_DATA=str(data_root), **GATED)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
    ranks = [[line.split() for line in (tmp_path / f"draws.{rank}").read_text().splitlines()] for rank in (0, 1)]
    assert [line[:2] for line in ranks[0]] == [line[:2] for line in ranks[1]]  # steps and weights
    numbers = [line[2] for lines in ranks for line in lines]
    assert len(set(numbers)) == len(numbers) >= 8
