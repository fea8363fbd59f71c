"""One run from request to result: claim its folder, train or resume, write the result."""

import contextlib
import logging
import os
import shlex
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nin.config.changes import find_differences, require_no_fewer_epochs
from nin.config.errors import shorten
from nin.config.schema import FolderData, Settings, UserError
from nin.config.validation import validate_plain
from nin.data.sources import prepare
from nin.runs.console import format_path, log_to, tensorboard_command
from nin.runs.folder import RunFolder, find_weights_file
from nin.runs.imports import lightning_imports
from nin.runs.results import PRINTED, print_finished, print_result
from nin.runs.undo import undo_if_refused
from nin.runs.versions import read_git_commit, read_own_code, read_versions
from nin.system.devices import add_remedy, is_of_machine, require_accelerator
from nin.system.processes import StoppedError, multi_process_launcher
from nin.training.request import RunRequest

if TYPE_CHECKING:
    from nin.training.experiment import Experiment

log = logging.getLogger(__name__)

# The keys that are read from a result that another process wrote, each with the type of its value.
_RESULT: dict[str, Any] = {
    "metrics": dict, "epochs": int, "steps": int, "train_seconds": int | float, "parameters": int,
    "weights_sha256": str, "best_weights_sha256": str | None, "images_per_second": int | float | None,
}  # fmt: skip


class RunFailedError(Exception):
    """The run failed; the traceback is already in its log and on standard error."""


def execute_run(request: RunRequest) -> dict[str, Any]:
    """Brings a run to its end from wherever it is: trains it, resumes it, or reads the result of a finished one.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: if the folder belongs to another experiment, another process works on it, or the machine lacks what
            the settings need.
        RunFailedError: if the work failed.
        StoppedError: if a signal stopped it.
    """
    folder, settings = request.folder, request.settings
    _require_folder_of_a_run(folder)
    require_same_experiment(folder, settings)
    if result := read_finished_result(folder, settings):
        if request.rank == 0:
            others = _with_others(folder, settings, result)
            print_finished(folder, result, others, request.label, is_job=bool(settings.sweep.keys))
        return result
    had_result = folder.result.exists()
    with lightning_imports():
        from nin.data.splits import require_training_images
        from nin.networks.build import require_buildable
        from nin.training.experiment import Experiment  # noqa: F401  # what imports it later finds it loaded
        from nin.training.loss import require_known_loss
        from nin.training.optimizers import require_known_schedule

    if settings.weights and not folder.has_progress():
        find_weights_file(Path(settings.weights))
    require_buildable(settings)  # all before data are downloaded or decoded
    require_known_loss(settings)
    require_known_schedule(settings)
    require_accelerator(settings.trainer)
    prepare(settings.data)
    require_training_images(settings.data, settings.seed)
    if request.rank != 0:  # rank 0 has claimed the folder and writes the result
        return _train_other_rank(request)
    with folder.claim(_waiting(request) if request.wait else None):
        # Another process may have begun another experiment here in the meantime, or have ended this one.
        require_same_experiment(folder, settings)
        result = read_finished_result(folder, settings)
        if not result and not had_result and folder.result_status() == "failed":
            print(f"{request.label}{format_path(folder.path)} has failed in another process, see nin.log", flush=True)
            raise RunFailedError
        result = result or _train_and_record(request)
    print_result(folder, result, request.label)
    return result


def _with_others(folder: RunFolder, settings: Settings, result: dict[str, Any]) -> str:
    """With which precision and how many processes the result was computed, if others are requested now."""
    now, before = settings.trainer, read_settings(folder).trainer
    precision, processes = result.get("precision"), result.get("processes")
    others = []
    if precision and now.precision not in (before.precision, precision):
        others.append(f"trainer.precision={precision}")
    if processes and any(getattr(now, key) != getattr(before, key) for key in ("strategy", "devices", "num_nodes")):
        others.append(f"{processes} process{'es' * (processes != 1)}")
    return " with " * bool(others) + " and ".join(others)


def _train_other_rank(request: RunRequest) -> dict[str, Any]:
    from nin.training.experiment import Experiment

    with log_to(None):
        try:
            return Experiment(request).run()
        except (UserError, KeyboardInterrupt):
            raise
        except StoppedError as stopped:
            if multi_process_launcher() is None and "LOCAL_RANK" in os.environ:
                # Lightning started this process: with another status it would kill rank 0, which may still be writing.
                stopped.exit_status = 0
            raise
        except Exception as error:
            add_remedy(error, request.settings)
            log.exception("rank %d failed", request.rank)
            raise RunFailedError from error


def _require_folder_of_a_run(folder: RunFolder) -> None:
    if folder.config.exists() or folder.has_progress():
        return
    if replaced := [path.name for path in (folder.metrics, *folder.event_files()) if path.exists()]:
        it, files = ("it", "the file") if len(replaced) == 1 else ("them", "the files")
        raise UserError(
            f"{folder.path}: contains {', '.join(replaced)} but no run; a new run would overwrite {it}; give another "
            f"name=…, or remove {files}"
        )


def require_same_experiment(folder: RunFolder, settings: Settings) -> None:
    """Raises UserError if ``folder`` has another experiment than ``settings``, or any, with ``resume=never``."""
    if not folder.has_progress():
        return
    if settings.resume == "never":
        raise UserError(f"{folder.path}: exists, and resume=never; give another name=…, or resume=auto to resume it")
    if different := find_differences(read_settings(folder), settings):
        started = shlex.join(folder.read_overrides())
        experiment = f"another experiment{f' ({shorten(started, 200)})' if started else ''}"
        header = f"{folder.path} belongs to {experiment}; give another name=…, or the settings that it has:"
        raise UserError("\n  ".join([header, *different]))


def read_settings(folder: RunFolder) -> Settings:
    """The settings of the run in ``folder``, as plain values.

    Raises:
        UserError: if neither its config nor a checkpoint has them.
    """
    if (config := folder.read_request()) is not None:
        return validate_plain(config)
    # Copied without its hidden files; the checkpoints have the settings as well.
    from nin.checkpoints.files import load_newest_valid, read_checkpoint_settings

    found = load_newest_valid(folder, rename=False)
    if found is None:
        raise UserError(
            f"{folder.path}: has a result and neither {folder.config} nor a checkpoint; remove the run's folder"
        )
    return read_checkpoint_settings(found[1], found[0])


def read_finished_result(folder: RunFolder, settings: Settings) -> dict[str, Any] | None:
    """Returns the result of a finished or pruned run, or None if work is left.

    Work is left if the run never ended or it failed, if ``settings`` request more epochs, or if the test was left out
    before and is requested now.

    Raises:
        UserError: if the result lacks a part, or the folder of images is another one, with other images, or fewer
            epochs are requested than the run has.
    """
    result = folder.read_result()
    if result is None or result["status"] == "failed":
        return None
    wrong = [key for key, kind in _RESULT.items() if not isinstance(result.get(key), kind)]
    if "metrics" not in wrong:
        metrics = result["metrics"]
        wrong += [f"metrics.{name}" for name in PRINTED if not isinstance(metrics.get(name), int | float | None)]
    if wrong:
        raise UserError(
            f"{folder.result}: these entries are missing or have the wrong type: {', '.join(wrong)}; remove the file "
            "and run the command again"
        )
    untested = result["status"] == "finished" and result["metrics"].get("test/acc") is None
    if untested and settings.sweep.test:
        return None
    requested, previous = settings.trainer.max_epochs, read_settings(folder)
    if requested != previous.trainer.max_epochs and (requested in (-1, None) or requested > result["epochs"]):
        return None
    if not settings.sweep.keys:  # of a sweep, finished jobs are skipped, also those that were extended
        require_no_fewer_epochs(requested, result["epochs"])
    _require_same_images(folder, settings, previous, result)
    return result


def _require_same_images(folder: RunFolder, settings: Settings, previous: Settings, result: dict[str, Any]) -> None:
    data, before = settings.data, previous.data
    if not (isinstance(data, FolderData) and isinstance(before, FolderData)):
        return
    if data.root == before.root and not Path(data.root).is_dir():
        return  # a finished run does not need its images
    from nin.data.splits import open_folder

    cache = open_folder(data)
    if (result.get("images_sha256"), result.get("images")) != (cache.fingerprint, cache.counts):
        raise UserError(
            f"data.root={data.root}: has other images, or in other parts, than {before.root} had in the finished "
            f"run {folder.path}; give another name=…"
        )


def _waiting(request: RunRequest) -> Callable[[str], None]:
    printed = False

    def wait(reason: str) -> None:
        nonlocal printed
        if not printed:
            print(f"{request.label}{reason}", flush=True)
            printed = True
        if request.stop.signum is not None:
            raise StoppedError(request.stop.signum)

    return wait


def _train_and_record(request: RunRequest) -> dict[str, Any]:
    from nin.training.experiment import Experiment

    folder = request.folder
    place = f"run folder: {format_path(folder.path)}"
    if any("TensorBoard" in str(logger.get("_target_")) for logger in request.settings.logger.values()):
        place += f", curves: {tensorboard_command(folder.path.resolve().parent)}"
    with undo_if_refused(folder), log_to(folder.log, request.label):
        try:
            experiment = Experiment(request)
            lines = experiment.describe_start().splitlines()
            print("\n".join(f"{request.label}{line}" for line in lines), flush=True)
            if not request.settings.sweep.keys:  # a sweep has printed the job's folder
                print(place, flush=True)
            started = record_start(request, experiment)
            result = experiment.run(started["resumes"]) | started
            folder.write_result(result)
            return result
        except StoppedError as stopped:
            message = f"{stopped}; {experiment.describe_end()}"
            log.info("%s", message)
            print(message, file=sys.stderr)
            raise
        except (UserError, KeyboardInterrupt) as error:  # Ctrl-C before the run listens to signals
            log.info("%s", f"refused: {error}" if isinstance(error, UserError) else "stopped by Ctrl-C at the start")
            raise
        except Exception as error:
            add_remedy(error, request.settings)
            log.exception("the run failed")
            reason = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
            failed = {"status": "failed", "error": reason, "overrides": request.overrides, "command": request.command}
            if is_of_machine(error):
                failed["cause"] = "machine"
            with contextlib.suppress(OSError):  # the failure may be a full disk
                folder.write_result(failed)
            raise RunFailedError from error


def record_start(request: RunRequest, experiment: "Experiment") -> dict[str, Any]:
    """Writes the requested config, the overrides and the versions of the code.

    It is called when everything that can be refused before data are loaded has been checked.

    Returns:
        The part of the result about the code that the run used: ``versions``, ``git_commit`` and ``own_code`` of the
        first start, ``resumes``, and ``resumed_with`` for resumes with other code.
    """
    folder, resumed = request.folder, experiment.resume_checkpoint is not None
    code: dict[str, Any] = {"versions": read_versions(), "git_commit": read_git_commit()}
    if own_code := read_own_code(experiment.settings):
        code["own_code"] = own_code
    # The result first: after a crash in between, an extended run must not look finished.
    folder.result.unlink(missing_ok=True)
    # Paths in it are absolute, so that the run can be resumed from any working directory. Not mode="json", in which all
    # keys are texts: a class of the user's own may have numbers, as {6: 2.0}.
    folder.write_request(experiment.settings.model_dump(), request.overrides)
    state = folder.read_state()
    earlier = [start for start in state.get("starts", []) if isinstance(start, dict)]
    starts = [*earlier, code] if resumed else [code]
    resumes = state.get("resumes", 0) + 1 if resumed else 0
    run_id = experiment.run_id or state.get("run_id") or uuid.uuid4().hex
    folder.update_state(run_id=run_id, starts=starts, resumes=resumes, options=request.options or None)
    others = [start for start in starts[1:] if start != starts[0]]
    return starts[0] | {"resumes": resumes} | ({"resumed_with": others} if others else {})
