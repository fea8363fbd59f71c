"""One run in several processes, as torchrun, srun and Lightning start them: ranks, and the folder that they share."""

import os
from pathlib import Path
from typing import Any

from nin.config.schema import Trainer, UserError
from nin.config.validation import is_single_process

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def require_single_process_start(trainer: Trainer) -> None:
    """Checks that a run of one process was not started several times.

    Raises:
        UserError: if each process of torchrun or srun would train a network of its own.
    """
    if (launcher := multi_process_launcher()) and is_single_process(trainer):
        total = os.environ["WORLD_SIZE" if launcher == "torchrun" else "SLURM_STEP_NUM_TASKS"]
        local = os.environ["LOCAL_WORLD_SIZE"] if launcher == "torchrun" else "… (the processes per node)"
        raise UserError(
            f"{launcher} started {total} processes, and trainer.strategy={trainer.strategy} uses one; "
            f"add trainer=ddp trainer.devices={local}"
        )


def multi_process_launcher() -> str | None:
    """The program that started this process together with others, "torchrun" or "srun"; None if it is alone."""
    if started_by_torchrun():
        return "torchrun"
    return "srun" if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None


def started_by_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def global_rank(trainer: Trainer) -> int:
    """The rank of this process in its run, before Lightning knows it. The only process of a run has rank 0.

    Variables that another program left in the environment are removed for a run of one process: Lightning would take
    the process for another rank, and nothing would be logged or saved.
    """
    if is_single_process(trainer):
        for key in _RANKS:
            if os.environ.get(key, "0") != "0":
                del os.environ[key]
        return 0
    return environment_rank()


def environment_rank() -> int:
    """The rank that torchrun, Lightning or SLURM has set in the environment; 0 if none has."""
    return next((int(os.environ[key]) for key in _RANKS if key in os.environ), 0)


def broadcast_run_dir(run_dir: str) -> None:
    """Sends the run folder from rank 0 of torchrun's processes to the others, whose clocks may name another one."""
    if started_by_torchrun() and os.environ["RANK"] == "0":
        _torchrun_store().set(_run_dir_key(), str(Path(run_dir).absolute()))


def receive_run_dir() -> list[str]:
    """The override that puts another rank of torchrun's processes into the run folder of rank 0."""
    if not started_by_torchrun() or os.environ["RANK"] == "0":
        return []
    return [f"hydra.run.dir={quoted(_torchrun_store().get(_run_dir_key()).decode())}"]


def _run_dir_key() -> str:
    """Differs for each restart: the store outlives the processes that torchrun starts again."""
    return f"nin/run_dir/{os.environ['TORCHELASTIC_RESTART_COUNT']}"


def _torchrun_store() -> Any:
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def quoted(text: str) -> str:
    """``text`` as a quoted value in Hydra's override grammar."""
    return "'" + text.replace("'", "\\'") + "'"
