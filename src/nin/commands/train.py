"""``nin train``: train a network, then test its best checkpoint once. A Hydra command; ``-m`` sweeps."""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nin.checks import differences, read
from nin.commands.report import report
from nin.config import all_mistakes, first_job, settings_from
from nin.data.files import prepare
from nin.run_folder import RunFolder, global_rank, logging_to
from nin.settings import Settings, Trainer, UserError, project_conf
from nin.sweep import job_folder


class RunFailedError(Exception):
    """A run failed; the traceback is in its log and on standard error already."""


def main(arguments: list[str]) -> int:
    sys.argv = [sys.argv[0], *arguments]
    # Exceptions come to us instead of being printed by Hydra with exit status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    run = hydra.main(version_base="1.3", config_path=str(project_conf()), config_name="train")(job)
    try:
        run()
    except UserError:
        return 1  # told when it happened; the sweep's other jobs went on
    except (HydraException, OmegaConfBaseException) as error:
        known = get_args_parser().parse_args(arguments)
        overrides = first_job(known.overrides) if known.multirun else known.overrides
        raise all_mistakes(error, overrides, known.config_dir) from None
    except RunFailedError:
        return 1
    except OSError as error:  # Hydra makes the run's folder before the job begins
        raise UserError(
            f"{error.filename}: can't be written ({error.strerror}); start elsewhere, or set hydra.run.dir=…"
        ) from error
    finally:
        if _sweep_folder and any(_sweep_folder.glob("*/.hydra/overrides.yaml")):
            report(_sweep_folder)
    return 0


# The sweep that this process runs, and the key that tells its jobs what it varies.
_sweep_folder: Path | None = None
_KEYS = "sweep.keys"

# For hydra.sweep.subdir in conf/train.yaml.
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


class BeforeStart(Callback):
    """Hydra calls it when the config is composed and nothing has been written: what can't work is refused here."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        with _ending_the_program():
            settings = read(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
            if not is_finished(RunFolder(config.hydra.run.dir), settings):
                prepare(settings.data)
                require_accelerator(settings.trainer)

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Finds mistakes in any of the jobs, and has their folders named by what is swept alone."""
        with _ending_the_program():
            params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
            overrides = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
            if config.hydra.sweeper._target_.endswith("BasicSweeper"):  # another one finds its values on the way
                _check_jobs([job for (job,) in BasicSweeper.split_arguments(overrides, 1)])
            swept, fixed = (
                [o.key_or_group for o in overrides if o.is_sweep_override() == varies] for varies in (True, False)
            )
            # Each job's config is composed anew, from these.
            config.hydra.overrides.hydra += [
                f"hydra.job.config.override_dirname.exclude_keys=[{','.join([*fixed, _KEYS])}]",
                f"{_KEYS}=[{','.join(swept)}]",
            ]
            global _sweep_folder
            _sweep_folder = Path(config.hydra.sweep.dir)


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


def _check_jobs(jobs: list[list[str]]) -> None:
    """Raises UserError with the mistakes of all jobs of a sweep."""
    mistakes: dict[str, None] = {}
    for job in jobs:
        try:
            settings = settings_from(job)
            prepare(settings.data)
            require_accelerator(settings.trainer)
        except UserError as error:
            mistakes |= dict.fromkeys(error.mistakes)
    if mistakes:
        raise UserError(*mistakes)


def require_accelerator(trainer: Trainer) -> None:
    """Raises UserError if the accelerator that was asked for by name is not there; only then is torch needed."""
    if trainer.accelerator in ("auto", "cpu"):
        return
    import torch

    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if {"gpu": cuda or mps, "cuda": cuda, "mps": mps}.get(trainer.accelerator, True):
        return
    found = f"{cuda} CUDA GPU(s)" if cuda else "an Apple GPU" if mps else "no GPU that torch can use, only the CPU"
    raise UserError(
        f"trainer.accelerator={trainer.accelerator}: this machine has {found} (torch {torch.__version__}); "
        f"type trainer={'gpu' if cuda else 'mps' if mps else 'cpu'}, or trainer=auto, which takes the best there is"
    )


def job(config: DictConfig) -> float | None:
    """One run; in a sweep, one of its jobs. Returns val/acc, for sweepers that optimise."""
    hydra_config = HydraConfig.get()
    try:
        overrides = [word for word in hydra_config.overrides.task if not word.startswith(f"{_KEYS}=")]
        result = carry_out(config, Path(hydra_config.runtime.output_dir), overrides)
    except UserError as mistake:
        print(f"nin train: {mistake}", file=sys.stderr)
        with contextlib.suppress(OSError):
            Path(hydra_config.runtime.output_dir).rmdir()  # if Hydra has just made it and nothing was written
        if hydra_config.mode == RunMode.MULTIRUN and not config.sweep.fail_fast:
            raise
        sys.exit(2)  # not through Hydra, which would add lines of its own
    except RunFailedError:
        if hydra_config.mode == RunMode.MULTIRUN and not config.sweep.fail_fast:
            raise
        sys.exit(1)
    return result["metrics"]["val/acc"]


def carry_out(config: DictConfig, path: Path, overrides: list[str]) -> dict[str, Any]:
    """Brings the run in folder ``path`` to its end, from wherever it is, and shows and returns its result.

    Raises:
        UserError: if the folder belongs to another experiment or another process is at work on it.
        RunFailedError: if the work failed.
    """
    from nin.report import show_result, shown

    settings = read(config)
    folder = RunFolder(path, settings.checkpoint.keep)
    _require_same_experiment(folder, settings)
    if is_finished(folder, settings):
        result = folder.read_result()
        print(f"{shown(path)} is finished; to run it anew, give another name=… or remove the folder")
    elif global_rank() == 0:
        with folder.claimed():
            with logging_to(None):
                from nin.experiment import build_trainer

                build_trainer(settings, folder.path, [])  # what Lightning refuses is refused before all else
            # As read: with absolute paths, so that the run goes on from wherever it is asked to.
            folder.write_asked(OmegaConf.create(settings.model_dump(mode="json")), overrides)
            folder.result.unlink(missing_ok=True)
            with logging_to(folder.log):
                result = _train(settings, folder, overrides)
    else:
        with logging_to(None):
            return _train(settings, folder, overrides)
    show_result(folder, result)
    return result


def is_finished(folder: RunFolder, settings: Settings) -> bool:
    """Whether the run has ended, and is not asked for more epochs than it has."""
    if folder.result_status() != "finished":
        return False
    asked, before = settings.trainer.max_epochs, folder.read_asked()
    if before is None or asked == before.trainer.max_epochs:
        return True
    return asked not in (-1, None) and asked <= folder.read_result()["epochs"]


def _require_same_experiment(folder: RunFolder, now: Settings) -> None:
    if not folder.has_progress() or (config := folder.read_asked()) is None:
        return
    before = read(config)
    if now.resume == "never":
        raise UserError(f"{folder.path}: exists, and resume=never; give another name=…, or leave resume=auto to go on")
    if different := differences(before, now):
        told = f"{folder.path} belongs to another experiment; give another name=…, or the settings that it has:"
        raise UserError("\n  ".join([told, *different]))


def _train(settings: Settings, folder: RunFolder, overrides: list[str]) -> dict[str, Any]:
    from nin.experiment import train
    from nin.stopping import StoppedError

    log = logging.getLogger("nin")
    try:
        result = train(settings, folder, overrides)
        if global_rank() == 0:
            folder.write_result(result)
        return result
    except StoppedError as stopped:
        log.info("%s; last.ckpt is of this very step", stopped)
        print(f"{stopped}; last.ckpt is saved, and the same command goes on from there", file=sys.stderr)
        sys.exit(stopped.exit_status)
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
