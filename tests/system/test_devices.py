"""What a machine lacks is reported before training, and a run has the threads that it requests."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import SMALL, merge
from nin import cli
from nin.config.composition import compose_settings
from nin.config.schema import Settings, UserError
from nin.runs.folder import RunFolder
from nin.system.devices import (
    THREADS_VARIABLE,
    add_remedy,
    is_of_machine,
    own_gpu,
    require_accelerator,
    require_working_gpu,
)
from nin.system.processes import remove_left_over_ranks
from nin.training.experiment import Experiment
from nin.training.request import RunRequest
from nin.training.run import execute_run

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")


def test_batch_norm_is_synchronized_on_gpus_only(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The accelerator is "auto", so that only the machine decides.
    two = settings("trainer=ddp", "trainer.devices=2", "trainer.sync_batchnorm=true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"trainer\.sync_batchnorm=true: .* CUDA GPUs only; set it to false"):
        execute_run(RunRequest(two, RunFolder(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_accelerator(two.trainer)


@without_gpu
def test_a_missing_gpu_is_reported_before_data_are_written(settings: Callable[..., Settings], tmp_path: Path) -> None:
    requested = settings("trainer.accelerator=gpu", f"data.root={tmp_path / 'data'}")
    with pytest.raises(UserError, match=r"trainer\.accelerator=gpu: this machine has no GPU"):
        execute_run(RunRequest(requested, RunFolder(tmp_path / "run")))
    assert not list(tmp_path.iterdir())


def test_hidden_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES='' hides others, unset it to use them; use trainer=cpu"):
        require_accelerator(compose_settings(["trainer=gpu"]).trainer)


@pytest.mark.parametrize(
    ("devices", "process", "gpu"),
    [("auto", 0, 0), ("auto", 1, 1), (2, 1, 1), ("2", 0, 0), ([3], 0, 3), ([2, 5], 1, 5), ("1,", 0, 1), ("4,6", 1, 6)],
)
def test_the_gpu_whose_abilities_count_is_the_processs_own(
    devices: int | str | list[int], process: int, gpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(process))
    assert own_gpu(devices) == gpu
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("SLURM_LOCALID", str(process))  # srun's
    monkeypatch.setenv("SLURM_PROCID", str(process + 2))
    assert own_gpu(devices) == gpu
    remove_left_over_ranks()  # a run of one process, in a shell that srun started
    assert own_gpu("auto") == 0


@without_gpu
@pytest.mark.parametrize("trainer", ["gpu", "auto"])
def test_a_gpu_that_the_driver_counts_and_torch_cannot_use_is_refused(
    trainer: str,
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As with a driver that is too old. Here there is no driver, with which torch fails at the same place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    words = merge([*SMALL, f"trainer={trainer}", f"data.root={data_root}", "callbacks=none", "logger=none"])
    assert cli.run("train", words) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"nin train: trainer: torch {torch.__version__} can't use cuda:0: ")
    assert f"; update the driver, which must support CUDA {torch.version.cuda}, or install a build of" in message
    assert message.endswith("or train without it: trainer=cpu\n")
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_without_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has …"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be …"),  # none for CUDA itself
    ):

        def full(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(torch, "ones", full)
        with pytest.raises(UserError, match=r"cuda:0: CUDA .*out of memory; end the other programs .*nvidia-smi"):
            require_working_gpu(torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"^trainer.devices: requests cuda:1, and torch can use 1 CUDA GPU"):
        require_working_gpu(torch.device("cuda", 1))


def test_a_missing_file_of_own_code_is_no_fault_of_the_machine() -> None:
    def raised(error: Exception) -> Exception:
        with pytest.raises(type(error)) as caught:
            raise error  # in this file, which is own code
        return caught.value

    assert is_of_machine(raised(OSError(errno.ENOSPC, "No space left on device")))
    assert is_of_machine(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    assert is_of_machine(OSError(errno.EACCES, "Permission denied"))  # not in own code
    assert not is_of_machine(raised(FileNotFoundError(errno.ENOENT, "No such file or directory")))
    assert not is_of_machine(RuntimeError("x"))


def test_the_error_of_a_full_gpu_has_its_remedy() -> None:
    full = [
        torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("Triton Error [CUDA]: out of memory"),
    ]  # fmt: skip
    other, compilation = RuntimeError("something else"), torch._inductor.exc.CppCompileError(["gcc"], "no")
    for error in (*full, other, compilation):
        add_remedy(error, compose_settings(["data.batch_size=512"]))
    for error in full:
        assert "too little free memory for data.batch_size=512: end other programs" in error.__notes__[0]
        assert "data.memory_limit_mib" not in error.__notes__[0]
    of_folder = torch.OutOfMemoryError("CUDA out of memory.")
    add_remedy(of_folder, compose_settings(["data=folder", "data.root=.", "data.image_size=67"]))
    assert "a smaller data.memory_limit_mib, above which images are not stored on the GPU" in of_folder.__notes__[0]
    assert compilation.__notes__ == ["The network could not be compiled: set compile=false to train without it"]
    assert not hasattr(other, "__notes__")
    single = ValueError("Expected more than 1 value per channel when training, got input size torch.Size([1, 4])")
    add_remedy(single, compose_settings([]))
    assert "set data.batch_size to 2 or more for each process" in single.__notes__[0]


def test_torch_computes_with_as_many_threads_as_a_run_requests(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, found = torch.get_num_threads(), []
    monkeypatch.setenv(THREADS_VARIABLE, "2")  # of a run that requests none
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    several = ("threads=4", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    try:
        for words in (("threads=3",), (), several):
            Experiment(RunRequest(settings(*words), RunFolder(tmp_path)))
            found.append((torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]))
    finally:
        torch.set_num_threads(before)
    assert found == [(3, "1"), (2, "1"), (4, "4")]  # the processes that Lightning starts inherit the variable
