"""One run in several processes, as torchrun, srun and Lightning start them: ranks, and the folder that they share."""

import os
from pathlib import Path
from typing import Any

from nin.config.schema import Trainer, UserError, is_single_process

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them


def require_matching_start(trainer: Trainer) -> None:
    """Checks that the processes of the run are started as ``trainer`` says.

    Raises:
        UserError: if each process of torchrun or srun would train a network of its own, or if nothing starts the
            processes of the other nodes, for which Lightning would wait without a message.
    """
    if (launcher := multi_process_launcher()) and is_single_process(trainer):
        total = os.environ["WORLD_SIZE" if launcher == "torchrun" else "SLURM_STEP_NUM_TASKS"]
        local = os.environ["LOCAL_WORLD_SIZE"] if launcher == "torchrun" else "… (the processes per node)"
        raise UserError(
            f"{launcher} started {total} processes, and trainer.strategy={trainer.strategy} uses one; "
            f"add trainer=ddp trainer.devices={local}"
        )
    if trainer.num_nodes > 1 and not started_on_several_nodes():
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: this process was started on one node only; start it on every node "
            "with torchrun or srun, or set MASTER_ADDR and NODE_RANK on each"
        )


def started_on_several_nodes() -> bool:
    """Whether torchrun, SLURM or variables that the user has set describe a cluster to Lightning."""
    return started_by_torchrun() or "MASTER_ADDR" in os.environ or int(os.environ.get("SLURM_NNODES", 1)) > 1


def multi_process_launcher() -> str | None:
    """The program that started this process together with others, "torchrun" or "srun"; None if it is alone."""
    if started_by_torchrun():
        return "torchrun"
    return "srun" if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None


def started_by_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def global_rank(trainer: Trainer) -> int:
    """The rank of this process in its run, before Lightning knows it. The only process of a run has rank 0."""
    if is_single_process(trainer):
        remove_left_over_ranks()
        return 0
    return environment_rank()


def remove_left_over_ranks() -> None:
    """Removes variables that another program left in the environment of a run of one process.

    Lightning, which reads them when it is imported, would take the process for another rank, and nothing would be
    logged or saved.
    """
    for key in _RANKS:
        if os.environ.get(key, "0") != "0":
            del os.environ[key]


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
