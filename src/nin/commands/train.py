"""``nin train``: train a network, then test its best checkpoint once. A Hydra command; ``-m`` starts a sweep."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.utils import run_job
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nin.commands.options import expand_path
from nin.config.changes import SAME_EXPERIMENT, select_training_callbacks
from nin.config.composition import COMPOSITION_ERRORS, collect_errors, first_job_overrides
from nin.config.errors import printable_lines
from nin.config.hydra_options import (
    SEARCH_PATH,
    find_config_options,
    format_config_options,
    open_hydra,
    parse_arguments,
    unwrap_job_result,
)
from nin.config.keys import is_within, split_override
from nin.config.schema import CONF, UserError
from nin.config.validation import find_override_errors, validate
from nin.runs.console import tolerate_output_errors
from nin.runs.folder import RunFolder, job_folder
from nin.system.processes import StoppedError, broadcast_run_dir, global_rank, receive_run_dir, require_matching_start
from nin.training.request import RunRequest
from nin.training.run import RunFailedError, execute_run


def main(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return show(arguments, args)
    if args.resolve or args.package:
        raise UserError("--resolve and --package: are for --cfg, as in nin train --cfg job --resolve; add it")
    tolerate_output_errors()
    args.overrides += receive_run_dir()
    with open_hydra(args.config_dir, args.config_path, args.overrides) as app:
        is_sweep = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
        config = compose(app, args, RunMode.MULTIRUN if is_sweep else RunMode.RUN)
        try:
            return start_sweep(app, config) if is_sweep else run_once(app, config)
        except OSError as error:  # Hydra makes the folder
            if error.errno is None:  # a library can't be loaded
                raise
            key, folder = ("sweep", config.hydra.sweep.dir) if is_sweep else ("run", config.hydra.run.dir)
            raise UserError(
                f"{error.filename or folder}: can't be written ({error.strerror}); start elsewhere, or set "
                f"hydra.{key}.dir=…"
            ) from error


def show(arguments: list[str], args: argparse.Namespace) -> int:
    """Hydra's own ``--help``, ``--cfg``, ``--info`` and shell completion."""
    if args.cfg and args.multirun and not (args.help or args.hydra_help):
        raise UserError("--cfg and -m exclude each other; leave out -m, and give each swept key one value")
    # Hydra's parser refuses overrides that follow an option.
    sys.argv = [sys.argv[0], *args.overrides, *(word for word in arguments if word not in args.overrides)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise exceptions instead of printing them
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(lambda config: None)()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        with open_hydra(args.config_dir, args.config_path, args.overrides):
            raise collect_errors(error, args.overrides, args.config_dir, args.config_name or "train") from None
    except ValueError as error:  # options that exclude each other
        raise UserError(str(error)) from None
    return 0


def compose(app: Hydra, args: argparse.Namespace, mode: RunMode) -> DictConfig:
    """Composes the config, with Hydra's own section, for one run or for a sweep.

    Raises:
        UserError: lists every error in the overrides.
    """
    config_name = args.config_name or "train"
    try:
        config = app.compose_config(config_name, args.overrides, run_mode=mode)
        config.hydra.mode = mode
    except COMPOSITION_ERRORS as error:
        known = first_job_overrides(args.overrides) if mode == RunMode.MULTIRUN else args.overrides
        raise collect_errors(error, known, args.config_dir, config_name) from None
    _require_effective_defaults(app, config.hydra.runtime.choices.get("experiment"))
    if config.hydra.job.chdir:
        raise UserError(
            f"hydra.job.chdir={str(config.hydra.job.chdir).lower()}: a run stays in the working directory, so that "
            "relative paths keep their meaning; leave it out"
        )
    if config.hydra.output_subdir is not None:
        raise UserError(
            f"hydra.output_subdir={config.hydra.output_subdir}: a run keeps its own .hydra/, whose config Hydra would "
            "overwrite; leave it out"
        )
    launchers = [word for word in args.overrides if word.startswith("hydra/launcher=") and not word.endswith("=basic")]
    if mode == RunMode.RUN and launchers:
        raise UserError(f"{launchers[0]}: starts the jobs of a sweep; add -m, or leave it out")
    if mode == RunMode.RUN and (name := _name_with_changes(config)):
        config.name = name
    for section in (config.hydra.run, config.hydra.sweep):
        folder = OmegaConf.to_container(section, resolve=False)["dir"]  # type: ignore[call-overload,index]
        if str(folder).startswith("~"):  # a shell does not expand it after "="
            section.dir = str(expand_path(folder))
    return config


def _require_effective_defaults(app: Hydra, experiment: str | None) -> None:
    """Raises UserError if the file of ``experiment`` overrides the experiment, which Hydra would silently ignore."""
    file = experiment and app.config_loader.repository.load_config(f"experiment/{experiment}")  # type: ignore[attr-defined]
    for entry in (file and file.defaults_list) or []:
        if entry.is_override() and entry.group.strip("/") == "experiment":
            raise UserError(
                f"experiment={experiment}: its file's defaults have override /experiment: {entry.value}, which has no "
                f"effect there; to start from it: defaults: [{entry.value}, _self_]"
            )


def _name_with_changes(config: DictConfig) -> str | None:
    """``quickstart,optimizer.lr=0.01`` for ``experiment=quickstart optimizer.lr=0.01``: another run than the plain one.

    None if the command line gives the name, if the experiment has none, or if nothing is changed that makes it another
    experiment.
    """
    overrides = _task_overrides(config)
    given = any(word.lstrip("+").startswith("name=") for word in overrides)
    if given or "name" not in config or OmegaConf.is_interpolation(config, "name"):
        return None
    words = {split_override(word)[0]: word for word in overrides}
    groups: Any = OmegaConf.to_container(config, resolve=False)
    callbacks, data = groups.get("callbacks"), groups.get("data")  # not validated yet, and may be left out
    others = isinstance(callbacks, dict) and select_training_callbacks(callbacks)
    has_own_data = isinstance(data, dict) and "_target_" in data
    # Resuming may change the precision; a new run with another one has another result.
    other = ["trainer.precision"] + ["callbacks"] * bool(others) + ["data"] * has_own_data
    other += ["speed.micro_batch"] * bool(groups.get("loss"))
    # The group `trainer` chooses where a run trains, so it does not make another experiment.
    changes = sorted(
        word
        for key, word in words.items()
        if key not in ("experiment", "trainer") and (is_within(key, other) or not is_within(key, SAME_EXPERIMENT))
    )
    return job_folder(",".join([config.name, *changes])) if changes else None


def _task_overrides(config: DictConfig) -> list[str]:
    """The command line's overrides as they were given: OmegaConf would resolve ``${…}`` in their texts too."""
    return OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # type: ignore[return-value]


def run_once(app: Hydra, config: DictConfig) -> int:
    """One run, as Hydra's job in the run's folder. Returns the exit status."""
    request = _build_request(config)
    path = request.folder.path.resolve()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    callbacks = Callbacks(config)
    callbacks.on_run_start(config=config, config_name=config.hydra.job.config_name)
    context = HydraContext(config_loader=app.config_loader, callbacks=callbacks)
    try:
        # Not app.run(), which would compose the config a second time and lose the name that `compose` has chosen.
        done = run_job(lambda _: execute_run(request), config, "hydra.run.dir", None, context)
        callbacks.on_run_end(config=config, config_name=config.hydra.job.config_name, job_return=done)
        unwrap_job_result(done)
        return 0
    except (UserError, KeyboardInterrupt):  # Ctrl-C before the run listens to signals
        _remove_empty(path, existing)
        raise
    except RunFailedError:
        return 1
    except StoppedError as stopped:
        stopped.requeue()
        return stopped.exit_status


def _build_request(config: DictConfig) -> RunRequest:
    """The run that a composed config requests.

    Raises:
        UserError: lists every error in the config, or says why it is no single run of this process.
    """
    overrides = _task_overrides(config)
    if errors := find_override_errors(overrides):
        raise UserError(*errors)
    settings = validate(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    folder = RunFolder(config.hydra.run.dir)
    require_matching_start(settings.trainer)
    if config.hydra.sweeper.get("params"):
        raise UserError("a sweep has several runs: add -m, as in nin train -m sweep=relu experiment=nin_small")
    if not config.hydra.run.dir.strip():
        raise UserError("hydra.run.dir: is empty; leave it out, or give the run's folder")
    broadcast_run_dir(config.hydra.run.dir)
    of_hydra = [w for w in config.hydra.overrides.hydra if split_override(w)[0] not in ("hydra.mode", SEARCH_PATH)]
    options = [*format_config_options(find_config_options(config.hydra)), *of_hydra]
    return RunRequest(settings, folder, overrides, options, rank=global_rank(settings.trainer))


def _remove_empty(folder: Path, existing: Path) -> None:
    """Removes the folders between ``existing`` and ``folder`` that a refused run has left empty."""
    with contextlib.suppress(OSError):
        while folder != existing:
            folder.rmdir()
            folder = folder.parent


def start_sweep(app: Hydra, config: DictConfig) -> int:
    """A sweep: its jobs, and at the end its report. Returns the exit status."""
    from nin.sweeps.launch import Sweep
    from nin.sweeps.summary import report

    sweep, status = Sweep(config), 0
    try:
        status = sweep.run(app.config_loader)
    finally:
        if any(sweep.folder.glob("*/.hydra/overrides.yaml")):
            try:
                report(sweep.folder, storage=sweep.search.settings.storage if sweep.search else None)
            except UserError as error:  # raised here, it would take the place of what ended the sweep
                print(f"nin train: no report: {printable_lines(str(error))}", file=sys.stderr)
                status = status or 2
    return status
