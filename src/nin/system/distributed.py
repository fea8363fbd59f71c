"""One run in several processes, as torchrun and srun start them: each knows of the others, and all share one folder."""

import os
from pathlib import Path
from typing import Any

from nin.config.schema import Trainer, UserError, is_single_process


def require_single_process_start(trainer: Trainer) -> None:
    """Raises UserError if each of torchrun's or srun's processes would train a network of its own."""
    if (by := multi_process_launcher()) and is_single_process(trainer):
        every = os.environ["WORLD_SIZE" if by == "torchrun" else "SLURM_STEP_NUM_TASKS"]
        here = os.environ["LOCAL_WORLD_SIZE"] if by == "torchrun" else "…, as many as there are on a node"
        raise UserError(
            f"{by} started {every} processes, and trainer.strategy={trainer.strategy} is for one; "
            f"add trainer=ddp trainer.devices={here}"
        )


def multi_process_launcher() -> str | None:
    """What has started this process with others beside it, torchrun or srun; None if it is alone."""
    if started_by_torchrun():
        return "torchrun"
    return "srun" if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def global_rank() -> int:
    """Which process of a distributed run this is, as Lightning, torchrun and SLURM tell it."""
    return next((int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if key in os.environ), 0)


def broadcast_run_dir(folder: str) -> None:
    """The first of torchrun's processes tells the others its folder; they would each name one by their own clock."""
    if started_by_torchrun() and os.environ["RANK"] == "0":
        _torchrun_store().set(_folder_key(), str(Path(folder).absolute()))


def receive_run_dir() -> list[str]:
    """The override that makes one of torchrun's other processes work in the first one's folder."""
    if not started_by_torchrun() or os.environ["RANK"] == "0":
        return []
    return [f"hydra.run.dir={quoted(_torchrun_store().get(_folder_key()).decode())}"]


def _folder_key() -> str:
    """Anew for each start: the store outlives the processes that torchrun starts again."""
    return f"nin/folder/{os.environ['TORCHELASTIC_RESTART_COUNT']}"


def _torchrun_store() -> Any:
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def quoted(text: str) -> str:
    """As Hydra's grammar wants any text that is a value."""
    return "'" + text.replace("'", "\\'") + "'"
