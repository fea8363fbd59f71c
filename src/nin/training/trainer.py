"""Builds Lightning's Trainer, with the loggers and callbacks that the config names by ``_target_``."""

import difflib
import inspect
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from nin.checkpoints.checkpoint_io import AtomicCheckpointIO
from nin.config.errors import locate_in_own_code
from nin.config.keys import is_within
from nin.config.own_classes import explain_import_error, require_annotated_types
from nin.config.schema import Settings, UserError
from nin.runs.folder import RunFolder
from nin.system import devices
from nin.training.callbacks.progress import EpochPrinter, TrainingProgressBar

log = logging.getLogger(__name__)

# Callbacks of Lightning that are refused, each with the reason.
_REFUSED = {
    StochasticWeightAveraging: (
        "a run with StochasticWeightAveraging can't be resumed, because it replaces the schedule, and the average is "
        "computed after the last checkpoint, so that it is not tested; use callbacks=ema, or "
        "lightning.pytorch.callbacks.WeightAveraging"
    ),
    ModelPruning: (
        "a run with ModelPruning can't be resumed, because its checkpoints lack the masks; leave it out, and prune the "
        "trained network with torch.nn.utils.prune"
    ),
    OnExceptionCheckpoint: (
        "with OnExceptionCheckpoint, Lightning starts a new run from the checkpoint of whichever run failed before; "
        "leave it out: last.ckpt is saved when a signal stops a run"
    ),
    LearningRateFinder: (
        "LearningRateFinder would change optimizer.lr, which is a setting of the run; compare several by a sweep: "
        "nin train -m optimizer.lr=0.001,0.01,0.1 sweep.test=false"
    ),
    BatchSizeFinder: (
        "BatchSizeFinder would change data.batch_size, which is a setting of the run; nin bench prints the memory of a "
        "step by batch size, then give data.batch_size=…"
    ),
}


def build_trainer(
    settings: Settings,
    folder: Path | None,
    callbacks: Sequence[lightning.Callback] = (),
    resume_step: int | None = None,
) -> lightning.Trainer:
    """Builds Lightning's Trainer.

    Args:
        folder: the run's folder, where loggers write; None for no files.
        callbacks: added before those of ``settings.callbacks``, and checkpoint callbacks after them.
        resume_step: the first optimizer step that is logged again after resuming.

    Raises:
        UserError: if Lightning refuses an argument, or the machine lacks what ``settings.trainer`` needs.
    """
    arguments = settings.trainer.model_dump()
    loggers, own = _instantiate(_logger_and_callback_configs(settings, folder, resume_step), folder)
    # Lightning's own bar: `TrainingProgressBar` replaces it, and is replaced by one of the user's.
    has_own_bar = any(isinstance(callback, ProgressBar) for callback in own)
    arguments["enable_progress_bar"] = has_own_bar and settings.trainer.enable_progress_bar is not False
    if has_own_bar:
        callbacks = [c for c in callbacks if not isinstance(c, TrainingProgressBar | EpochPrinter)]
    # Lightning calls checkpoint callbacks last and in this order: the run's own saves what the others have done.
    checkpoints = [c for c in callbacks if isinstance(c, Checkpoint)]
    callbacks = [*(c for c in callbacks if c not in checkpoints), *own, *checkpoints]
    # Lightning would add a `ModelCheckpoint` of its own to a Trainer without one.
    arguments["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
    arguments["use_distributed_sampler"] = settings.uses_distributed_sampler
    arguments["precision"] = devices.resolve_precision(settings.trainer)
    arguments["profiler"] = settings.trainer.profiler or NoProfiler()
    # With None, Lightning leaves what an earlier job of a sweep has set for the process. To set False takes seconds.
    if torch.are_deterministic_algorithms_enabled():
        arguments["deterministic"] = settings.trainer.deterministic or False
    arguments["benchmark"] = settings.trainer.benchmark or False
    try:
        trainer = lightning.Trainer(
            **arguments,
            logger=loggers,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(_writable_folders(folder, callbacks))],
            default_root_dir=folder,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        raise UserError(f"trainer: {error}") from error
    # Lightning would replace the signal handlers of `StopRequest` for the time of the fit, and its own end the process
    # after SIGTERM with exit status 0 and without a checkpoint.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # noqa: SLF001
    return trainer


def _writable_folders(folder: Path | None, callbacks: Sequence[lightning.Callback]) -> list[Path] | None:
    """The folders in which checkpoints may be saved and removed; None for all, if the user has own callbacks."""
    if any(not is_within(type(callback).__module__, ["nin", "lightning"]) for callback in callbacks):
        return None
    given = [getattr(callback, "dirpath", None) for callback in callbacks]
    return [*([folder] if folder else []), *(Path(dirpath) for dirpath in given if dirpath)]


class NoProfiler(PassThroughProfiler):
    """Measures nothing; Lightning's default runs a generator for each hook of each callback in every step."""

    profile = nullcontext  # type: ignore[assignment]  # gives the name of the action, as Lightning's does


def _logger_and_callback_configs(
    settings: Settings, folder: Path | None, resume_step: int | None
) -> dict[str, dict[str, Any]]:
    """The configs of the loggers, with what depends on this run, and of the callbacks, by their keys."""
    configs = {}
    for name, config in settings.logger.items():
        target = str(config.get("_target_", ""))
        takes_folder = "save_dir" in _parameters(target) and "save_dir" not in config
        # Without a folder nothing is logged, but some loggers make their folder when they are built.
        extra: dict[str, Any] = {"save_dir": str(folder or tempfile.gettempdir())} if takes_folder else {}
        if resume_step and target.endswith("TensorBoardLogger"):
            extra["purge_step"] = resume_step  # TensorBoard discards what it has read of the steps that are repeated
        if target.endswith("SingleFileTensorBoardLogger"):
            extra["score_each_epoch"] = settings.data.score_each_epoch
        version = config.get("version")  # without one, CSVLogger itself uses the next number
        if resume_step and version is not None and target.endswith("CSVLogger"):
            extra["version"] = f"{version}-{resume_step}"  # CSVLogger would delete the existing file
        configs[f"logger.{name}"] = config | extra
    return configs | {f"callbacks.{name}": config for name, config in settings.callbacks.items()}


def _parameters(target: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(get_object(target)).parameters
    except (HydraException, ImportError, AttributeError, ValueError, TypeError):
        return {}  # `_instantiate` reports it


def _instantiate(
    configs: dict[str, dict[str, Any]], folder: Path | None
) -> tuple[list[Logger], list[lightning.Callback]]:
    instances: dict[type, list[Any]] = {Logger: [], lightning.Callback: []}
    for key, config in configs.items():
        kind = Logger if key.startswith("logger.") else lightning.Callback
        target = str(config.get("_target_"))
        require_annotated_types(key, target, config, _parameters(target))
        try:
            instance = instantiate(config)
        except (HydraException, OmegaConfBaseException) as error:
            if f"Error locating target '{target}'" not in str(error):
                cause = error.__cause__ or error
                # Hydra has the error's repr(), which lacks the name of a missing file.
                text = str(error).replace(repr(cause), f"{type(cause).__name__}: {cause}").replace(":\n", ": ")
                raise UserError(f"{key}: {text}{locate_in_own_code(cause)}") from error
            raise UserError(f"{key}._target_={target}: {explain_import_error(target, error)}") from error
        if not isinstance(instance, kind):
            raise UserError(f"{key}: its _target_ must be a subclass of Lightning's {kind.__name__}, not {instance!r}")
        for refused, reason in _REFUSED.items():
            if isinstance(instance, refused):
                raise UserError(f"{key}: {reason}")
        if folder is not None and isinstance(instance, Checkpoint):
            _keep_apart(key, instance, RunFolder(folder))
        if kind is lightning.Callback:
            _warn_of_misspelled_hooks(key, type(instance))
        instances[kind].append(instance)
    return instances[Logger], instances[lightning.Callback]


def _keep_apart(key: str, callback: Any, folder: RunFolder) -> None:
    """Gives a `ModelCheckpoint` a folder of its own; by default it would overwrite the run's ``last.ckpt``.

    Raises:
        UserError: if its ``dirpath`` is that folder.
    """
    if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
        callback.dirpath = str(folder.path.resolve() / "model_checkpoints")
    dirpath = getattr(callback, "dirpath", None)
    if dirpath and Path(dirpath).resolve() == folder.checkpoints.resolve():
        raise UserError(f"{key}.dirpath={dirpath}: has the run's own checkpoints; choose another folder")


def _warn_of_misspelled_hooks(key: str, callback: type) -> None:
    """Lightning never calls them, and says nothing. A method of another kind may have such a name: no error."""
    own = [found for found in callback.__mro__ if not is_within(found.__module__, ["nin", "lightning"])]
    for name in sorted({name for found in own for name in vars(found) if name.startswith("on_")}):
        similar = ", ".join(difflib.get_close_matches(name, dir(lightning.Callback), cutoff=0.7))
        if similar and not hasattr(lightning.Callback, name):
            method = f"{callback.__name__}.{name}"
            log.warning("%s: Lightning never calls %s; its hooks with similar names: %s", key, method, similar)
