"""What a run computes with: Lightning's Trainer with its loggers and callbacks, precision and threads."""

import logging
import os
import warnings
from pathlib import Path

import lightning
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from nin.checkpoints.files import AtomicCheckpointIO
from nin.config.schema import THREADS, Settings, UserError, is_single_process
from nin.runs.folder import RunFolder
from nin.system.devices import retain_freed_memory
from nin.training.callbacks.progress import TrainingProgressBar

# Lightning prints to the terminal through handlers of its own; what is logged goes where the run's folder says.
for _name in ("lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).handlers.clear()
    logging.getLogger(_name).propagate = True
# Lightning 2.6 asks torch 2.15's tree library in a way that is on its way out.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
# On a cluster's login node, and in a job that has one process.
warnings.filterwarnings("ignore", message=r"The `srun` command is available on your system but is not used")
# `MetricsLogger` logs at every epoch's end too, however short it is.
warnings.filterwarnings(
    "ignore", message=r"The number of training batches \(\d+\) is smaller than the logging interval"
)


retain_freed_memory()

# Before any run has set another number; one of joblib's processes is told that of a run alone.
_DEFAULT_THREADS = int(os.environ.get(THREADS, torch.get_num_threads()))


def threads_of(settings: Settings, folder: RunFolder) -> int | None:
    """How many threads a run in ``folder`` computes with: as asked, as it began, or as torch would have it.

    Sums are rounded in an order that hangs on it. None leaves it to Lightning, where there are several processes.
    """
    if settings.threads or not is_single_process(settings.trainer):
        return settings.threads
    return (folder.read_request() or {}).get("threads") or _DEFAULT_THREADS


def set_threads(settings: Settings) -> None:
    """Those that the settings ask for, or as many as torch would have, whatever this process did before."""
    torch.set_num_threads(settings.threads or _DEFAULT_THREADS)


def build_trainer(
    settings: Settings, folder: Path | None, callbacks: list[lightning.Callback], purge_step: int | None = None
) -> lightning.Trainer:
    """Lightning's Trainer with the settings' loggers and callbacks beside those given.

    Raises:
        UserError: if the machine lacks what ``settings.trainer`` asks for.
    """
    arguments = settings.trainer.model_dump()
    if arguments["precision"] in (None, "auto"):
        # Up to twice the speed and half the maps' memory; weights, sums and the loss stay float32.
        on_gpu = arguments["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        on_cpu = not on_gpu and arguments["accelerator"] in ("auto", "cpu") and arguments["precision"] == "auto"
        native = (on_gpu and _gpu_has_bfloat16()) or (on_cpu and _cpu_has_bfloat16())
        arguments["precision"] = "bf16-mixed" if native else None
    if not arguments.pop("enable_progress_bar"):
        callbacks = [callback for callback in callbacks if not isinstance(callback, TrainingProgressBar)]
    loggers = []
    try:
        for logger in settings.logger.values():
            more = {"save_dir": str(folder)}
            if purge_step and logger.get("_target_", "").endswith(("SingleFileTensorBoardLogger", "TensorBoardLogger")):
                more["purge_step"] = purge_step
            version = logger.get("version")  # without one it takes the next number itself
            if purge_step and version is not None and logger.get("_target_", "").endswith("CSVLogger"):
                more["version"] = f"{version}-{purge_step}"  # it would delete the file that is there
            loggers.append(instantiate(logger, **more))
        callbacks = callbacks + [instantiate(callback) for callback in settings.callbacks.values()]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"logger or callbacks: {error}") from error
    if odd := [c for c in [*loggers, *callbacks] if not isinstance(c, Logger | lightning.Callback)]:
        raise UserError(f"logger or callbacks: an entry needs a _target_ that is one of Lightning's, not {odd[0]!r}")
    try:
        return lightning.Trainer(
            **arguments,
            logger=loggers,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=folder,
            enable_progress_bar=False,  # Lightning's own; `TrainingProgressBar` is ours
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        raise UserError(f"trainer: {error}") from error


def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bfloat16() -> bool:
    """Whether it multiplies it; others would emulate it, slowly. Older versions of torch can't tell."""
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
