"""``nin resume RUN [overrides]``: continue the run in a folder, from its own config."""

import argparse
from pathlib import Path

from nin.commands.options import add_allow_option
from nin.config.changes import MAY_CHANGE
from nin.config.composition import apply_overrides
from nin.config.schema import Settings, UserError
from nin.config.trust import require_trusted_targets, with_local_defaults
from nin.config.validation import validate_plain
from nin.data.sources import with_found_root
from nin.runs.console import tolerate_output_errors
from nin.runs.folder import RunFolder
from nin.sweeps.checks import require_search_packages
from nin.system.processes import StoppedError, global_rank, require_matching_start
from nin.training.request import RunRequest
from nin.training.run import RunFailedError, execute_run

# Resuming the run in this folder is what this command does.
OVERRIDABLE = tuple(key for key in MAY_CHANGE if key not in ("resume", "name"))


def main(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    tolerate_output_errors()
    folder = RunFolder(args.run)
    settings, overrides = read_resumed_settings(folder, args.overrides, args.allow)
    require_matching_start(settings.trainer)
    options = [word for word in folder.read_state().get("options", []) if isinstance(word, str)]
    try:
        execute_run(RunRequest(settings, folder, overrides, options, rank=global_rank(settings.trainer)))
    except RunFailedError:
        return 1
    except StoppedError as stopped:
        stopped.requeue()
        return stopped.exit_status
    return 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nin resume",
        allow_abbrev=False,
        description="Continue an interrupted or failed run from its last.ckpt, to the result that it would have had "
        "without the interruption; with trainer.max_epochs=… also a finished one, if its schedule does not depend on "
        "the number of steps.",
        epilog=f"may change: {', '.join(OVERRIDABLE)}; of the callbacks those that only observe the training",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, as in outputs/runs/first")
    parser.add_argument(
        "overrides", nargs="*", default=[], help="key=value for what may change, as in trainer.max_epochs=20"
    )
    add_allow_option(parser)
    return parser.parse_intermixed_args(arguments)  # overrides may follow --allow


def read_resumed_settings(folder: RunFolder, overrides: list[str], allowed: list[str]) -> tuple[Settings, list[str]]:
    """The settings to resume with, and all overrides that led to them.

    The stored config is plain data: no interpolation is resolved, it names no addresses to download from, and no class
    but callbacks of this project and of Lightning, loggers of local files, and losses, optimizers and schedules of
    torch, unless its module is ``allowed``.

    Raises:
        UserError: if the folder has no valid config, or an override is not allowed.
    """
    config = folder.read_request()
    if config is None:
        if any(folder.path.glob("*/.hydra/overrides.yaml")):
            raise UserError(f"{folder.path}: holds several runs; to resume a sweep, run its command again")
        if not folder.path.exists():
            raise UserError(f"{folder.path}: no such folder; runs are folders in outputs/runs")
        raise UserError(f"{folder.path}: not a run's folder (it has no .hydra/config.yaml); runs are in outputs/runs")
    stored = with_local_defaults(validate_plain(config))
    require_trusted_targets(stored, allowed, overrides)
    settings = apply_overrides(with_found_root(stored), overrides, OVERRIDABLE)
    if settings.sweep.prune:  # a trial of a search
        require_search_packages()
    # The stored overrides are only recorded, not composed: they may name anything.
    return settings.model_copy(update={"resume": "auto"}), [*folder.read_overrides(), *overrides]
