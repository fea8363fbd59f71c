"""One experiment: build the module, the data and the Trainer, fit, test the best checkpoint, describe the result."""

import contextlib
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from nin.checkpoints import files as checkpoint_files
from nin.checkpoints.weights import hash_weights, load_weights, require_matching_weights
from nin.config.changes import require_no_fewer_epochs
from nin.config.schema import FolderData, Settings, UserError, is_single_process
from nin.data.module import ImageDataModule
from nin.data.splits import describe_folder
from nin.networks.build import require_complete_state
from nin.runs.results import never_predicted
from nin.system import devices
from nin.system.processes import StoppedError, convert_worker_exit_to_stop, leave_process_group
from nin.training.callbacks.checkpoints import ResumableCheckpoint
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.callbacks.progress import EpochPrinter, SlowTrainingWarner, TrainingProgressBar
from nin.training.callbacks.tensorboard import SingleFileTensorBoardLogger, log_request, log_results, log_settings
from nin.training.callbacks.training_control import TrainingControl, why_stopped
from nin.training.classifier import Classifier
from nin.training.evaluation import build_data, require_test_batches, test
from nin.training.initialization import start_from_checkpoint
from nin.training.request import RunRequest
from nin.training.trainer import build_trainer

log = logging.getLogger(__name__)


class Experiment:
    """The module, data and Trainer of one run, ready to train, or to resume from the folder's newest checkpoint.

    Args:
        request: what to run and where; the folder must be claimed.

    Raises:
        UserError: if the checkpoint is of another run, or the machine lacks what the settings need.
    """

    def __init__(self, request: RunRequest):
        self.request, self.folder = request, request.folder
        self.resume_path, self.resume_checkpoint, self.run_id = self._find_checkpoint()
        self.settings = self._with_threads(request.settings)
        devices.retain_freed_memory()
        devices.set_threads(self.settings)
        lightning.seed_everything(self.settings.seed, verbose=False)
        self.datamodule = build_data(self.settings)
        self.module = Classifier(self.settings, self.datamodule.class_names, self.datamodule.channels)
        require_complete_state(self.module.network, self.settings, self.module.in_channels, self.module.num_classes)
        self.initial_weights = None
        if self.settings.weights and self.resume_checkpoint is None:
            self.initial_weights = start_from_checkpoint(self.module.network, Path(self.settings.weights))
        self.metrics_logger = MetricsLogger(self.folder.metrics)
        self.checkpoint_callback = ResumableCheckpoint(
            self.folder, self.settings.checkpoint, self.metrics_logger, request.stop
        )
        self.pruning: list[Any] = []
        if self.settings.sweep.prune:
            from nin.training.callbacks.pruning import PruningCallback  # needs Optuna

            self.pruning.append(PruningCallback(self.folder.path, self.metrics_logger))
        resume_step = self.resume_checkpoint["global_step"] + 1 if self.resume_checkpoint else None
        self.trainer = build_trainer(self.settings, self.folder.path, self._callbacks(), resume_step)
        if self.trainer.precision == "64-true":  # as Lightning names it, also if the setting is 64
            self.module.double()  # Lightning does so after it has loaded a checkpoint, which float32 would round
        devices.require_working_gpu(self.trainer.strategy.root_device)
        self.device_name = devices.describe_device(self.trainer.strategy.root_device)
        self._require_resumable()
        if self.settings.sweep.test:
            require_test_batches(self.settings, self.datamodule, self.trainer)

    def _find_checkpoint(self) -> tuple[Path | None, dict[str, Any] | None, str | None]:
        """Path and content of the checkpoint to resume from, and the identity of its run; each None for a new run."""
        found = checkpoint_files.load_newest_valid(self.folder, rename=self.request.rank == 0)
        if found is None:
            return None, None, None
        path, checkpoint = found
        # The identity of the run is that of its folder, or where that was lost, of its checkpoint.
        run_id = self.folder.read_state().get("run_id")
        saved_by = checkpoint_files.require_same_run(checkpoint, path, self.request.settings, run_id)
        return path, checkpoint, run_id or saved_by

    def _with_threads(self, settings: Settings) -> Settings:
        """Returns the settings with the number of CPU threads filled in.

        A resumed run uses the number of its first start, because it determines the order in which sums are rounded.
        """
        if settings.threads or not is_single_process(settings.trainer):
            return settings  # Lightning chooses for several processes
        saved = self.resume_checkpoint["hyper_parameters"]["settings"]["threads"] if self.resume_checkpoint else None
        return settings.model_copy(update={"threads": saved or devices.default_threads()})

    def _callbacks(self) -> list[lightning.Callback]:
        logger, label = self.metrics_logger, self.request.label
        callbacks: list[lightning.Callback] = [logger, TrainingControl(logger), *self.pruning]
        if self.settings.trainer.enable_progress_bar:
            is_alone = sys.stdout.isatty() and not label
            callbacks.append(TrainingProgressBar(logger) if is_alone else EpochPrinter(logger, label))
        return [*callbacks, self.checkpoint_callback, SlowTrainingWarner()]

    def _require_resumable(self) -> None:
        if self.resume_checkpoint is None:
            return
        # The images first: a folder with one more class makes another network.
        images = self.resume_checkpoint.get(checkpoint_files.DATA_STATE_KEY)
        if isinstance(self.datamodule, ImageDataModule) and isinstance(images, dict):
            self.datamodule.load_state_dict(images)  # as Lightning does when the run has begun
        require_matching_weights(self.module, self.resume_checkpoint)
        require_no_fewer_epochs(self.settings.trainer.max_epochs, _completed_epochs(self.resume_checkpoint))
        state = self.resume_checkpoint["callbacks"][checkpoint_files.CALLBACK_STATE_KEY]
        if state["best"] and not self.folder.best.is_file():
            raise UserError(
                f"{self.folder.best}: is missing, and the run would end with the test of a worse epoch; put it back, "
                "or remove the run's folder to train again"
            )
        saved = len(state["processes"])
        if saved != self.trainer.world_size:
            raise UserError(
                f"trainer.devices: the run was started with {saved} process{'es' * (saved > 1)} and would now have "
                f"{self.trainer.world_size}, so that its batches would differ; start {saved}, or give another name=…"
            )

    def describe_start(self) -> str:
        """Network, data, device and precision in one line; further ones for a folder of images and for the weights."""
        model, data, trainer = self.settings.model, self.settings.data, self.trainer
        parameters = sum(p.numel() for p in self.module.network.parameters())
        count = trainer.max_epochs or -1
        length = f", {count} epoch{'s' * (count > 1)}" if count > 0 else ""
        length += (
            f", at most {trainer.max_steps:,} step{'s' * (trainer.max_steps > 1)}" if trainer.max_steps > 0 else ""
        )
        folder = f"\n{describe_folder(data, self.settings.seed)}" if isinstance(data, FolderData) else ""
        weights = f"\n{self.initial_weights.description}" if self.initial_weights else ""
        return (
            f"{model.name} ({parameters:,} parameters) on {data.name} at {data.image_size}x{data.image_size}"
            f"{length}, batches of {data.batch_size}; {trainer.world_size} x {self.device_name}, "
            f"precision {trainer.precision}{folder}{weights}"
        )

    def run(self, resumes: int = 0) -> dict[str, Any]:
        """Trains, tests the best checkpoint once and returns the result.

        Args:
            resumes: how often the run has been resumed, for its log.

        Raises:
            StoppedError: if a signal stopped it.
        """
        with contextlib.ExitStack() as cleanup:
            for logger in self.trainer.loggers:
                if isinstance(logger, SingleFileTensorBoardLogger):
                    cleanup.callback(logger.close)
            self._prepare_folder(resumes)
            self.resume_checkpoint = None  # frees its memory: Lightning reads the file itself
            cleanup.push(leave_process_group)
            cleanup.enter_context(self.request.stop)
            cleanup.push(self._end_other_processes)
            self._fit()
            early_end = self._report_early_end()
            final_weights = hash_weights(self.module.network)
            # If best.ckpt is missing or damaged, no other weights are tested instead.
            load_weights(self.module, checkpoint_files.read(self.folder.best))
            result = self._build_result(final_weights, *self._test()) | early_end
            if self.trainer.is_global_zero:
                log_results(self.trainer, self.settings, result, self.metrics_logger)
            return result

    def _end_other_processes(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the processes that Lightning started, if this one fails: they would wait for it, and keep their GPUs."""
        processes = getattr(self.trainer.strategy.launcher, "procs", [])
        if processes and kind is not None and not issubclass(kind, StoppedError):
            others = list(processes)
            processes.clear()  # Lightning would end this process too when it sees that the others have ended
            for process in others:
                process.kill()

    def _prepare_folder(self, resumes: int) -> None:
        """Removes what an interrupted process wrote after the checkpoint, and reports what is resumed."""
        if self.request.rank != 0:
            return
        log_settings(self.trainer, self.settings, self.request.overrides)
        if self.resume_checkpoint is None:
            self.folder.truncate_event_files({})  # left by a process that was killed before its first checkpoint
            self.folder.metrics.unlink(missing_ok=True)
            if self.initial_weights:
                log.info("%s", self.initial_weights.description)
                self.folder.update_state(weights=self.initial_weights.checksum)
            log_request(self.trainer, self.settings, self.request.command)
            return
        assert self.resume_path is not None  # found together with the checkpoint
        done, step = _completed_epochs(self.resume_checkpoint), self.resume_checkpoint["global_step"]
        at = f"the end of epoch {done}" if done == self.settings.trainer.max_epochs else f"epoch {done + 1}"
        place = f"{at}, step {step} ({self.resume_path.name})"
        log.info("resume #%d from %s", resumes, place)
        print(f"{self.request.label}resuming from {place}", flush=True)
        sizes = self.resume_checkpoint["callbacks"][checkpoint_files.CALLBACK_STATE_KEY]["event_files"]
        if incomplete := self.folder.truncate_event_files(sizes):
            log.warning("curves have a gap before step %d: %s", step, ", ".join(incomplete))

    def _fit(self) -> None:
        try:
            with convert_worker_exit_to_stop(self.request.stop):
                self.trainer.fit(self.module, self.datamodule, ckpt_path=self.resume_path, weights_only=True)
        except MisconfigurationException as error:
            if self.checkpoint_callback.is_restored:
                raise
            raise UserError(f"trainer: {error}") from error  # no step was taken
        # Lightning, torch and callbacks raise these if a state is of another type.
        except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            # Lightning itself refuses a Trainer argument, as val_check_interval above the number of batches.
            if isinstance(error, ValueError) and not self.checkpoint_callback.is_restored and _is_lightnings(error):
                raise UserError(f"trainer: {str(error).strip()}") from error
            if self.resume_path is None or self.checkpoint_callback.is_restored:
                raise
            log.info("the checkpoint's state could not be restored", exc_info=error)
            raise UserError(
                f"{self.resume_path}: can't be resumed: its state could not be restored ({type(error).__name__}: "
                f"{error}, see nin.log); remove it to resume from the checkpoint before it, or give another name=…"
            ) from error

    def _report_early_end(self) -> dict[str, Any]:
        """Prints why training has ended early; returns the result's entry for it, empty if it has not."""
        reason = None if self._is_pruned else why_stopped(self.trainer)
        if reason and self.trainer.is_global_zero:
            message = f"training ended early, in epoch {self.trainer.current_epoch}: {reason}"
            log.info("%s", message)
            print(f"{self.request.label}{message}", flush=True)
        return {"stopped_by": reason} if reason else {}

    def _test(self) -> tuple[dict[str, Any], int | None]:
        """Tests the module's weights; returns the metrics and the number of test images.

        All values are None for a trial of a search that is pruned or not to be tested.
        """
        if self._is_pruned or not self.settings.sweep.test:
            return dict.fromkeys(("test/loss", "test/acc", "test/acc_by_class")), None
        with convert_worker_exit_to_stop(self.request.stop):
            metrics, confusion = test(self.trainer, self.module, self.datamodule)
        missing = never_predicted(self.module.class_names, confusion)
        if missing and self.trainer.is_global_zero:
            log.warning(
                "never predicted for any of %d test images: %s; %s prints what is predicted instead",
                confusion.sum(), ", ".join(missing), self.request.eval_command,
            )  # fmt: skip
        return metrics, int(confusion.sum())

    @property
    def _is_pruned(self) -> bool:
        return any(callback.is_pruned for callback in self.pruning)

    def describe_end(self) -> str:
        """What a run that was stopped has saved, for the terminal."""
        saved, step = self.checkpoint_callback.saved_step, self.trainer.global_step
        if not self.folder.last.exists():
            return "no checkpoint is saved yet; start again from the beginning"
        state = "last.ckpt is saved" if saved == step else f"last.ckpt has step {saved} of {step}"
        return f"{state}; resume with: {self.request.resume_command}"

    def _build_result(self, final_weights: str, tested: dict[str, Any], test_images: int | None) -> dict[str, Any]:
        best, logger = self.checkpoint_callback.best, self.metrics_logger
        result = {
            "status": "pruned" if self._is_pruned else "finished",
            "metrics": {"val/loss": best.get("val/loss"), "val/acc": best.get("val/acc"), **tested},
            "epochs": self.trainer.current_epoch,
            "steps": self.trainer.global_step,
            "train_seconds": round(logger.train_seconds, 3),
            "images_per_second": round(logger.images / logger.step_seconds, 1) if logger.step_seconds else None,
            "parameters": sum(p.numel() for p in self.module.network.parameters()),
            "weights_sha256": final_weights,
            "best_weights_sha256": hash_weights(self.module.network),
            "seed": self.settings.seed,
            # Read again after training: with several processes, Lightning chooses the number of threads.
            "device": devices.describe_device(self.trainer.strategy.root_device),
            "precision": str(self.trainer.precision),
            "processes": self.trainer.world_size,
            "overrides": self.request.overrides,
            "command": self.request.command,
        }
        if test_images is not None:
            result["test_images"] = test_images
        if self.settings.weights:  # of the first start
            result["initial_weights_sha256"] = self.folder.read_state().get("weights")
        return result | (self.datamodule.notes if isinstance(self.datamodule, ImageDataModule) else {})


def _is_lightnings(error: Exception) -> bool:
    """Whether Lightning itself raised ``error``, and not what it called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("lightning.")


def _completed_epochs(checkpoint: dict[str, Any]) -> int:
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]  # type: ignore[no-any-return]
