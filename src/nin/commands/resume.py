"""``nin resume RUN [overrides]``: go on with the run in a folder, from its own config."""

import argparse
from pathlib import Path

from omegaconf import OmegaConf

from nin.commands.train import RunFailedError, execute_run, is_finished
from nin.config.composition import apply_overrides
from nin.config.schema import MAY_CHANGE, UserError
from nin.config.validation import validate
from nin.data.sources import prepare
from nin.runs.folder import RunFolder
from nin.sweeps.launch import require_accelerator
from nin.system.distributed import require_single_process_start
from nin.system.signals import StoppedError


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="nin resume",
        description="Go on with an interrupted or failed run from its last.ckpt, to the very result that it would "
        "have had; with trainer.max_epochs=… also with a finished one.",
        epilog=f"may change: {', '.join(MAY_CHANGE)}",
    )
    parser.add_argument("run", type=Path, help="a run's folder, as in outputs/runs/first")
    parser.add_argument("overrides", nargs="*", help="key=value for what may change, as in trainer.max_epochs=20")
    asked = parser.parse_args(arguments)

    folder = RunFolder(asked.run)
    config = folder.read_request()
    if config is None:
        raise UserError(f"{asked.run}: no run's folder (it has no .hydra/config.yaml); runs are in outputs/runs")
    before = list(OmegaConf.load(folder.overrides)) if folder.overrides.exists() else []
    try:
        settings = apply_overrides(validate(config), asked.overrides, MAY_CHANGE, before)
    except UserError:  # the earlier ones may need a --config-dir that is not here
        settings = apply_overrides(validate(config), asked.overrides, MAY_CHANGE)
    settings = settings.model_copy(update={"resume": "auto"})
    require_single_process_start(settings.trainer)
    if not is_finished(folder, settings):
        prepare(settings.data)
        require_accelerator(settings.trainer)
    try:
        execute_run(OmegaConf.create(settings.model_dump(mode="json")), asked.run, [*before, *asked.overrides])
    except RunFailedError:
        return 1
    except StoppedError as stopped:
        stopped.requeue()
        return stopped.exit_status
    return 0
