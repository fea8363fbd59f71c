"""What only a GPU can show: `python3 -m uv run pytest -m gpu -n 0`, on a machine with one or more CUDA GPUs.

Several minutes, most of them compilation. None of these tests has run yet: no GPU was available. What can be tested
without one is in `training/test_fake_cuda.py` and `training/test_compiled.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import merge, nin, outcome, run_experiment, start, wait_for
from nin.config.schema import Settings
from nin.runs.folder import RunFolder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU that torch can use"),
]

# Two epochs of 30 batches and a smaller last one, of the garments at 28x28.
RUN = ("experiment=quickstart", "trainer=gpu", "trainer.max_epochs=2", "data.batch_size=64", "data.val_size=8065",
       "data.augment=flip_shift", "trainer.log_every_n_steps=10")  # fmt: skip


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def train(folder: Path, data_root: Path, *overrides: str) -> dict[str, Any]:
    """Trains in a process of its own, and returns the result."""
    ran = nin("train", *RUN, f"data.root={data_root}", f"hydra.run.dir={folder}", *overrides, cwd=folder.parent)
    assert ran.returncode == 0, ran.stderr
    return result_of(folder)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_killed_run_ends_with_the_same_weights(
    precision: str, compiled: str, data_root: Path, tmp_path: Path
) -> None:
    overrides = ("trainer.deterministic=true", f"trainer.precision={precision}", f"compile={compiled}",
                 "checkpoint.every_n_steps=7")  # fmt: skip
    whole = train(tmp_path / "whole", data_root, *overrides)
    again = train(tmp_path / "again", data_root, *overrides)
    assert again["weights_sha256"] == whole["weights_sha256"]
    folder = tmp_path / "killed"
    words = merge([*RUN, f"data.root={data_root}", f"hydra.run.dir={folder}", *overrides])
    process = start("train", *words, cwd=tmp_path)
    wait_for(folder / "checkpoints" / "last.ckpt", process, seconds=600)
    process.kill()
    process.communicate()
    resumed = train(folder, data_root, *overrides)
    assert resumed["resumes"] == 1
    assert outcome(resumed) == outcome(whole)


def test_bfloat16_is_the_default_where_the_gpu_has_it_and_learns_as_float32_does(
    data_root: Path, tmp_path: Path
) -> None:
    ran = nin("train", *RUN, f"data.root={data_root}", f"hydra.run.dir={tmp_path / 'null'}", cwd=tmp_path)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert f"precision {'bf16-mixed' if native else '32-true'}" in ran.stdout
    results = {p: train(tmp_path / p, data_root, f"trainer.precision={p}") for p in ("bf16-mixed", "32-true")}
    for precision in results:
        assert results[precision]["metrics"]["test/acc"] == pytest.approx(
            results["32-true"]["metrics"]["test/acc"], abs=0.03
        )
        assert results[precision]["device"] == torch.cuda.get_device_name(0)


def test_cuda_graphs_give_the_losses_of_the_network_that_is_not_compiled(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the gradients of several batches are accumulated, in memory that each replay of a graph writes to."""
    # In TF32, torch's default, another kernel changes a loss by more than the tolerance.
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    for accumulated in (1, 2):
        losses = []
        for compiled in ("true", "false"):
            chosen = settings(
                "trainer.accelerator=gpu", "trainer.precision=32-true", "model.dropout=0", f"compile={compiled}",
                "logger=none", "callbacks=none", f"trainer.accumulate_grad_batches={accumulated}",
                "trainer.log_every_n_steps=1",
            )  # fmt: skip
            folder = RunFolder(tmp_path / f"{compiled}-{accumulated}")
            run_experiment(chosen, folder)
            losses.append([row["train/loss"] for row in folder.read_epochs()])
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_nothing_waits_for_the_gpu_between_two_loggings(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """torch raises wherever the CPU waits for the GPU: in a training step, the optimizer's, or taking a batch."""
    from lightning import Callback, Trainer

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            if (trainer.global_step + 1) % 5 == 0 or trainer.is_last_batch:
                torch.cuda.set_sync_debug_mode("default")  # the loggings that follow may wait

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if not trainer.is_last_batch:  # the validation that follows may wait
                torch.cuda.set_sync_debug_mode("error")

    words = ("compile=false", "data.augment=flip_shift", "callbacks=none", "logger=none", "trainer.log_every_n_steps=5")
    chosen = settings("trainer.accelerator=gpu", *words)
    try:
        run_experiment(chosen, RunFolder(tmp_path), callbacks=[Watch()])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_rates_of_the_bench(data_root: Path, tmp_path: Path) -> None:
    """40,000 images/s and ten times the notebooks' loop are goals for the notebooks' network: printed, not asserted."""
    out = tmp_path / "bench.json"
    ran = nin("bench", "trainer=gpu", f"data.root={data_root}", "--rounds", 1, "--out", out, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    print(ran.stdout)
    results = json.loads(out.read_text())
    assert results["device"] == torch.cuda.get_device_name(0)
    assert results["rates"]["training"] > results["rates"]["notebooks"]


def test_a_sweep_has_one_job_per_gpu(data_root: Path, tmp_path: Path) -> None:
    gpus = torch.cuda.device_count()
    seeds = ",".join(map(str, range(gpus + 1)))
    folder = tmp_path / "sweep"
    words = ("-m", *RUN, "hydra/launcher=joblib", "hydra.launcher.n_jobs=-1", f"seed={seeds}", f"data.root={data_root}")
    ran = nin("train", *words, f"hydra.sweep.dir={folder}", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    results = [json.loads(path.read_text()) for path in folder.glob("*/result.json")]
    assert [result["status"] for result in results] == ["finished"] * (gpus + 1)
    # With one GPU, jobs run in the sweep's own process, and none has to choose.
    assert len(list(folder.glob(".gpu-*.lock"))) == (gpus if gpus > 1 else 0)


def test_two_processes_share_one_gpu(data_root: Path, tmp_path: Path) -> None:
    """Two runs that know nothing of each other."""
    running = []
    for name in ("a", "b"):
        words = merge([*RUN, f"data.root={data_root}", f"hydra.run.dir={tmp_path / name}", "seed=3"])
        running.append(start("train", *words, "trainer.deterministic=true", cwd=tmp_path, CUDA_VISIBLE_DEVICES="0"))
    printed = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    assert result_of(tmp_path / "a")["weights_sha256"] == result_of(tmp_path / "b")["weights_sha256"]


def test_two_processes_of_one_run_on_one_gpu_are_refused(data_root: Path, tmp_path: Path) -> None:
    """NCCL can't have two ranks on one GPU, and would fail later with an error that does not say so."""
    ran = nin("train", *RUN, "trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=2", f"data.root={data_root}",
              f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path, CUDA_VISIBLE_DEVICES="0")  # fmt: skip
    assert ran.returncode == 2
    assert "trainer: " in ran.stderr
    assert "Traceback" not in ran.stderr
