"""One experiment from settings to result: build, fit, test the best checkpoint."""

import contextlib
import hashlib
import importlib.metadata
import logging
import platform
import subprocess
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from nin.checkpoints import files as checkpoint_files
from nin.config.schema import Settings, UserError, flat, is_single_process
from nin.data.module import ImageData
from nin.data.sources import CLASS_NAMES
from nin.runs.folder import RunFolder
from nin.system.distributed import global_rank
from nin.system.signals import StopRequest
from nin.training.callbacks.checkpoints import ResumableCheckpoint
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.callbacks.tensorboard import SingleFileTensorBoardLogger
from nin.training.callbacks.progress import TrainingProgressBar
from nin.training.classifier import Classifier, rounded
from nin.training.trainer import build_trainer, set_threads

log = logging.getLogger(__name__)


def train(
    settings: Settings,
    folder: RunFolder,
    overrides: list[str],
    label: str = "",
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Trains, tests the best checkpoint once and returns the result; goes on from ``last.ckpt`` where there is one.

    Args:
        label: stands before the lines that are printed on the way, where other runs print beside this one.

    Raises:
        UserError: if the machine lacks what the settings ask for.
        StoppedError: if it was stopped from outside; ``last.ckpt`` is saved.
    """
    going_on, checkpoint = checkpoint_files.load_newest_valid(folder) or (None, None)
    if checkpoint:
        _require_epochs_left(settings, checkpoint)

    set_threads(settings)
    lightning.seed_everything(settings.seed, verbose=False)
    data = ImageData(settings.data, settings.seed)
    module = Classifier(settings)
    if checkpoint:
        checkpoint_files.require_matching_weights(module, checkpoint)
    watch = MetricsLogger(folder.metrics)
    with stop or StopRequest() as stop, contextlib.ExitStack() as at_the_end:
        kept = ResumableCheckpoint(folder, settings.checkpoint.every_n_steps, watch, stop)
        # TensorBoard drops what it has already read of what was cut.
        purge_step = checkpoint["global_step"] + 1 if checkpoint else None
        trainer = build_trainer(settings, folder.path, [watch, TrainingProgressBar(watch, label), kept], purge_step)
        resumes = folder.resumes()
        if checkpoint:
            _require_as_many_processes(trainer, checkpoint)
            resumes = folder.resumes(one_more=global_rank() == 0)
            place = f"epoch {checkpoint['epoch']}, step {checkpoint['global_step']} ({going_on.name})"
            log.info("going on from %s, for the %d. time", place, resumes)
            print(f"{label}going on from {place}", flush=True)
        if global_rank() == 0:
            written = checkpoint["callbacks"][checkpoint_files.CALLBACK]["event_files"] if checkpoint else {}
            folder.truncate_event_files(written)
            if not checkpoint:
                folder.metrics.unlink(missing_ok=True)
        for logger in trainer.loggers:
            if isinstance(logger, SingleFileTensorBoardLogger):
                at_the_end.callback(logger.close)

        trainer.fit(module, data, ckpt_path=going_on, weights_only=True)
        final_weights = weights_sha256(module.network)
        # If it is gone or damaged that is told, and no other weights are tested in its place.
        module.load_state_dict(checkpoint_files.read(folder.best)["state_dict"])
        tested, confusion = test(trainer, module, data)
        result = {
            "status": "finished",
            "metrics": {"val/loss": kept.best.get("val/loss"), "val/acc": kept.best.get("val/acc"), **tested},
            "test_images": int(confusion.sum()),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "train_seconds": round(watch.train_seconds, 3),
            "images_per_second": round(watch.images / watch.step_seconds, 1) if watch.step_seconds else None,
            "parameters": sum(p.numel() for p in module.network.parameters()),
            "weights_sha256": final_weights,
            "seed": settings.seed,
            "device": device_name(trainer.strategy.root_device),
            "versions": versions(),
            "git_commit": git_commit(),
            "overrides": overrides,
            "resumes": resumes,
        }
        if trainer.is_global_zero:
            log_results(trainer, settings, result, watch)
        return result


def _require_epochs_left(settings: Settings, checkpoint: dict[str, Any]) -> None:
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    most = settings.trainer.max_epochs
    if most not in (-1, None) and epochs > most:
        raise UserError(
            f"trainer.max_epochs={most}: the run has {epochs} epochs behind it; give as many or more, or another name"
        )


def _require_as_many_processes(trainer: lightning.Trainer, checkpoint: dict[str, Any]) -> None:
    before, now = len(checkpoint["callbacks"][checkpoint_files.CALLBACK]["processes"]), trainer.world_size
    if before != now:
        raise UserError(
            f"trainer.devices: the run has {before} process{'es' * (before > 1)}, which share every batch, and now "
            f"there would be {now}: other batches, so another experiment; start as many, or give another name"
        )


def evaluate(settings: Settings, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Test metrics of a checkpoint's weights, and the confusion matrix: rows are true classes, columns predicted."""
    set_threads(settings)
    data = ImageData(settings.data, settings.seed)
    module = Classifier(settings)
    checkpoint_files.require_matching_weights(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    # Nothing is written and no curve is drawn; and one process tells it, whatever several of them trained.
    one = {} if is_single_process(settings.trainer) else {"strategy": "auto", "devices": 1, "num_nodes": 1}
    trainer = settings.trainer.model_copy(update=one)
    settings = settings.model_copy(update={"logger": {}, "callbacks": {}, "trainer": trainer})
    return test(build_trainer(settings, None, [TrainingProgressBar(MetricsLogger(Path()))]), module, data)


def test(trainer: lightning.Trainer, module: Classifier, data: ImageData) -> tuple[dict[str, Any], Tensor]:
    """Test loss, accuracy and accuracy by class of the module's weights, and the confusion matrix."""
    trainer.test(module, data, verbose=False)
    scores = rounded(trainer.callback_metrics)
    confusion = module.confusion.compute().cpu()
    right, all_ = confusion.diag().tolist(), confusion.sum(1).tolist()
    by_class = {name: r / n if n else None for name, r, n in zip(CLASS_NAMES, right, all_, strict=True)}
    metrics = {"test/loss": scores["test/loss"], "test/acc": scores["test/acc"], "test/acc_by_class": by_class}
    return metrics, confusion


def weights_sha256(network: torch.nn.Module) -> str:
    """SHA-256 of all weights and buffers, as little-endian bytes in state-dict order."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    packages = ("nin", "torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "numpy")
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, "+" behind it if files differ; None outside a checkout."""
    try:
        here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True, "timeout": 10}
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], **here)  # fails for an installed package
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip()
        return commit + ("+" if subprocess.run(["git", "status", "--porcelain", "-uno"], **here).stdout else "")
    except (OSError, subprocess.SubprocessError):
        return None


def log_results(trainer: lightning.Trainer, settings: Settings, result: dict[str, Any], watch: MetricsLogger) -> None:
    """The final metrics, and the settings beside them for TensorBoard's HParams tab.

    The metrics of the checkpoint that was tested are logged here and nowhere else, so that no tag has a step twice.
    """
    values = flat(settings.model_dump(include={"seed", "model", "data", "optimizer", "schedule"}))
    values["trainer.max_epochs"] = settings.trainer.max_epochs
    del values["data.root"], values["data.mirrors"]  # where files lie changes nothing
    if settings.sweep.keys:  # the same columns in all of a sweep's jobs, whichever networks they have
        given = dict(word.lstrip("+~").partition("=")[::2] for word in result["overrides"])
        # As Hydra reads them: 1e-05 is a number.
        values = {key: OmegaConf.from_dotlist([f"_={given[key]}"])._ for key in settings.sweep.keys if key in given}
    values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in values.items()}
    final = {
        k if k.startswith("test/") else f"best/{k}": v for k, v in result["metrics"].items() if isinstance(v, float)
    }
    # The notebooks' habit may have the test metrics in the curves already, at this very step.
    logged = watch.scores if watch.scored_step == result["steps"] else {}
    fresh = {k: v for k, v in final.items() if k not in logged}
    for logger in trainer.loggers:
        logger.log_metrics(fresh, step=result["steps"])
        if isinstance(logger, TensorBoardLogger):
            for summary in hparams(values, final):
                logger.experiment._get_file_writer().add_summary(summary)
        else:
            logger.log_hyperparams(values)
        logger.finalize("success")
