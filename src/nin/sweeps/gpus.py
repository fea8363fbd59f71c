"""One job per GPU: the GPUs of this machine are divided among the workers of a sweep."""

import os
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nin.config.schema import Settings, UserError
from nin.system.processes import StopRequest

# A sweep's first process sets it for its workers: the GPUs that they share.
_GPUS_VARIABLE = "NIN_GPUS"


def share_gpus(launcher: Any, jobs: list[Settings]) -> None:
    """Limits a joblib launcher to one job per GPU. Does nothing without a GPU, or if no job may use one.

    Args:
        launcher: the config of Hydra's joblib launcher; its ``n_jobs`` is reduced in place.
        jobs: settings of all jobs; of a search those of one trial.

    Raises:
        UserError: if a job that shares the GPUs with others requests one by its number.
    """
    import torch

    if not torch.cuda.is_available() or all(job.trainer.accelerator == "cpu" for job in jobs):
        return
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
    count = torch.cuda.device_count()  # the variable may name more than there are
    os.environ[_GPUS_VARIABLE] = ",".join(visible[:count] or map(str, range(count)))
    launcher.n_jobs = count if launcher.n_jobs < 0 else min(launcher.n_jobs, count)
    numbers = [job.trainer.devices for job in jobs if isinstance(job.trainer.devices, list)]
    if launcher.n_jobs > 1 and (wrong := [number for number in numbers if number != [0]]):
        raise UserError(
            f"trainer.devices={wrong[0]}: with hydra/launcher=joblib each of several jobs at once has one GPU, which "
            "is its number 0; leave it out, and choose GPUs with the variable CUDA_VISIBLE_DEVICES, or give "
            "hydra.launcher.n_jobs=1"
        )


def acquire_gpu(sweep: Path, stop: StopRequest) -> FileLock | None:
    """Makes a free one of the shared GPUs the only one that is visible to this process, before torch lists them.

    Waits while other processes of the same sweep use all of them.

    Returns:
        The lock, to be held as long as the process lives; None if no GPUs are shared, or a stop was requested.
    """
    while _GPUS_VARIABLE in os.environ and stop.signum is None:
        for gpu in os.environ[_GPUS_VARIABLE].split(","):
            lock = FileLock(sweep / f".gpu-{gpu}.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return lock
        time.sleep(1)
    return None
