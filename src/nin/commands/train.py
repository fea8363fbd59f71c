"""``nin train``: train a network, then test its best checkpoint once. A Hydra command; ``-m`` sweeps."""

import contextlib
import gc
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nin.config.composition import collect_errors, first_job_overrides
from nin.config.schema import Settings, UserError, project_conf
from nin.config.validation import differences, validate
from nin.data.sources import prepare
from nin.runs.folder import RunFolder, logging_to, write_atomically
from nin.sweeps.jobs import job_folder, own_overrides
from nin.sweeps.launch import (
    Launch,
    acquire_gpu,
    is_joblib,
    is_joblib_worker,
    require_accelerator,
    stop_other_workers,
)
from nin.sweeps.summary import report
from nin.system.distributed import broadcast_run_dir, global_rank, receive_run_dir, require_single_process_start
from nin.system.signals import StoppedError, StopRequest, back_in_queue


class RunFailedError(Exception):
    """A run failed; the traceback is in its log and on standard error already."""


def main(arguments: list[str]) -> int:
    sys.argv = [sys.argv[0], *arguments, *receive_run_dir()]
    # Exceptions come to us instead of being printed by Hydra with exit status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    run = hydra.main(version_base="1.3", config_path=str(project_conf()), config_name="train")(job)
    try:
        run()
    except (Exception, KeyboardInterrupt) as error:
        return _status(error, arguments)
    finally:
        if _launch and any(_launch.folder.glob("*/.hydra/overrides.yaml")):
            report(_launch.folder)
    return 0


# The sweep that this process has begun.
_launch: Launch | None = None

# For hydra.sweep.subdir in conf/train.yaml.
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def _status(error: Exception | KeyboardInterrupt, arguments: list[str]) -> int:
    """The exit status for what ended Hydra, or the UserError that tells of it."""
    if _launch and _launch.stopped_by:
        return StoppedError(_launch.stopped_by).exit_status
    if _launch and _launch.ended_fast:
        return 1  # the others were stopped because one failed
    match error:
        case StoppedError():
            return error.exit_status
        case UserError() | RunFailedError():
            return 1  # told when it happened; the sweep's other jobs went on
        case HydraException() | OmegaConfBaseException():
            known = get_args_parser().parse_args(arguments)
            overrides = first_job_overrides(known.overrides) if known.multirun else known.overrides
            raise collect_errors(error, overrides, known.config_dir) from None
        case BrokenProcessPool():
            print("nin train: a job's process was killed; the same command goes on from there", file=sys.stderr)
            return 1
        case ValueError() if "flag can only be used" in str(error) or str(error).startswith("Only one of --"):
            raise UserError(str(error)) from None  # Hydra's, of its own options
        case OSError():  # Hydra makes the run's folder before the job begins
            raise UserError(
                f"{error.filename}: can't be written ({error.strerror}); start elsewhere, or set hydra.run.dir=…"
            ) from error
    raise error


class BeforeStart(Callback):
    """Hydra calls it when the config is composed and nothing has been written: what can't work is refused here."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        with _ending_the_program():
            settings = validate(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
            require_single_process_start(settings.trainer)
            if config.hydra.sweeper.get("params"):
                raise UserError("a sweep has several runs: add -m, as in nin train -m sweep=head experiment=cpu")
            broadcast_run_dir(config.hydra.run.dir)
            if not is_finished(RunFolder(config.hydra.run.dir), settings):
                prepare(settings.data)
                require_accelerator(settings.trainer)

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        global _launch
        with _ending_the_program():
            _launch = Launch(config)


@contextlib.contextmanager
def _ending_the_program() -> Iterator[None]:
    """Hydra turns a callback's exceptions into warnings, all but the one that ends the program."""
    try:
        yield
    except UserError as mistake:
        print(f"nin train: {mistake}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def job(config: DictConfig) -> float | None:
    """One run; in a sweep, one of its jobs. Returns val/acc, for sweepers that optimise."""
    # Lightning's objects refer to each other: without this the job before would still hold its memory.
    gc.collect()
    hydra_config = HydraConfig.get()
    path = Path(hydra_config.runtime.output_dir)
    overrides = own_overrides(hydra_config.overrides.task)
    launcher = hydra_config.launcher._target_ if hydra_config.mode == RunMode.MULTIRUN else ""
    beside_others = is_joblib(launcher) and is_joblib_worker()
    in_turn = launcher.endswith("BasicLauncher") or (is_joblib(launcher) and not beside_others)
    try:
        if beside_others:
            result = _beside_others(config, path, overrides)
        else:
            stop = StopRequest()
            result = execute_run(config, path, overrides, stop=stop)
            if in_turn and stop.signum is not None:  # too late for this job, and for the next one not
                raise StoppedError(stop.signum)
        return result["metrics"]["val/acc"]
    except UserError as mistake:
        print(f"nin train: {mistake}", file=sys.stderr)
        status, ended = 2, UserError(*mistake.errors)
        with contextlib.suppress(OSError):
            path.rmdir()  # if Hydra has just made it and nothing was written
    except RunFailedError:
        status, ended = 1, RunFailedError()
    except StoppedError as stopped:
        stopped.requeue()
        status, ended = stopped.exit_status, StoppedError(stopped.signum)
    if in_turn:
        goes_on = status < 128 and not config.sweep.fail_fast
    else:  # another process waits to be told, unless SLURM will run this job again
        goes_on = bool(launcher) and not (status > 128 and back_in_queue())
    if goes_on:
        # Hydra keeps the exception to the sweep's end: a new one, whose traceback holds no network.
        raise ended
    sys.exit(status)  # not through Hydra, which would add lines of its own


# In one of joblib's processes: its own for all its jobs, and why it begins no further one.
_stop: StopRequest | None = None
_ended_by: RunFailedError | UserError | None = None


def _beside_others(config: DictConfig, path: Path, overrides: list[str]) -> dict[str, Any]:
    """A job in one of joblib's processes. An exception that no job expects would have the jobs beside it killed."""
    global _stop, _ended_by
    if _stop is None:
        _stop = StopRequest(with_parent=True)
        _stop.listen()
    if _ended_by:
        raise _ended_by
    acquire_gpu(path.parent, _stop)
    if _stop.signum is not None:
        raise StoppedError(_stop.signum)
    try:
        return execute_run(config, path, overrides, f"{path.name}  ", _stop)
    except (UserError, RunFailedError) as failure:
        if config.sweep.fail_fast:
            _ended_by = failure
            stop_other_workers()
        raise


def execute_run(
    config: DictConfig, path: Path, overrides: list[str], label: str = "", stop: StopRequest | None = None
) -> dict[str, Any]:
    """Brings the run in folder ``path`` to its end, from wherever it is, and shows and returns its result.

    Args:
        label: stands before the lines that the run prints on its way, where others print beside it.

    Raises:
        UserError: if the folder belongs to another experiment or another process is at work on it.
        RunFailedError: if the work failed.
        StoppedError: if it was stopped from outside.
    """
    from nin.runs.results import format_path, print_result

    settings = validate(config)
    folder = RunFolder(path, settings.checkpoint.keep)
    _require_same_experiment(folder, settings)
    if is_finished(folder, settings):
        result = folder.read_result()
        print(f"{format_path(path)} is finished; to run it anew, give another name=… or remove the folder")
    elif global_rank() == 0:
        # The processes of a sweep that was killed end soon.
        with folder.claimed(patience=20 if label else 0):
            if is_finished(folder, settings):  # by another process, since we looked
                return folder.read_result()
            with logging_to(None):
                from nin.training.trainer import build_trainer, threads_of

                build_trainer(settings, folder.path, [])  # what Lightning refuses is refused before all else
            settings = settings.model_copy(update={"threads": threads_of(settings, folder)})
            before = {
                file: file.read_text(encoding="utf-8")
                for file in (folder.config, folder.overrides, folder.result)
                if file.exists()
            }
            # As read: with absolute paths, so that the run goes on from wherever it is asked to.
            folder.write_request(OmegaConf.create(settings.model_dump(mode="json")), overrides)
            folder.result.unlink(missing_ok=True)
            with logging_to(folder.log, label):
                try:
                    result = _train(settings, folder, overrides, label, stop)
                except UserError:  # what is refused is not what the run was asked
                    for file, text in before.items():
                        write_atomically(file, text)
                    raise
    else:
        with logging_to(None):
            return _train(settings, folder, overrides, label, stop)
    print_result(folder, result)
    return result


def is_finished(folder: RunFolder, settings: Settings) -> bool:
    """Whether the run has ended, and is not asked for more epochs than it has."""
    if folder.result_status() != "finished":
        return False
    asked, before = settings.trainer.max_epochs, folder.read_request()
    if before is None or asked == before.trainer.max_epochs:
        return True
    return asked not in (-1, None) and asked <= folder.read_result()["epochs"]


def _require_same_experiment(folder: RunFolder, now: Settings) -> None:
    if not folder.has_progress() or (config := folder.read_request()) is None:
        return
    before = validate(config)
    if now.resume == "never":
        raise UserError(f"{folder.path}: exists, and resume=never; give another name=…, or leave resume=auto to go on")
    if different := differences(before, now):
        told = f"{folder.path} belongs to another experiment; give another name=…, or the settings that it has:"
        raise UserError("\n  ".join([told, *different]))


def _train(
    settings: Settings, folder: RunFolder, overrides: list[str], label: str, stop: StopRequest | None
) -> dict[str, Any]:
    from nin.training.experiment import train

    log = logging.getLogger("nin")
    try:
        result = train(settings, folder, overrides, label, stop)
        if global_rank() == 0:
            folder.write_result(result)
        return result
    except StoppedError as stopped:
        log.info("%s; goes on from last.ckpt", stopped)
        if global_rank() == 0:
            with contextlib.suppress(OSError):  # nobody listens any more
                print(f"{stopped}; last.ckpt is saved, and the same command goes on from there", file=sys.stderr)
        raise
    except UserError as mistake:
        log.info("refused: %s", mistake)
        raise
    except Exception as error:
        log.exception("the run failed")
        if global_rank() == 0:
            with contextlib.suppress(OSError):  # a full disk, say
                failed = {"status": "failed", "error": f"{type(error).__name__}: {error}", "overrides": overrides}
                folder.write_result(failed)
        raise RunFailedError from error
