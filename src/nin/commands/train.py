"""``nin train``: train a network, then test its best checkpoint once. A Hydra command; ``-m`` sweeps."""

import logging
import os
import sys

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nin.config import all_mistakes
from nin.data.files import prepare
from nin.run_folder import RunFolder, logging_to
from nin.settings import Settings, Trainer, UserError, project_conf, read


class RunFailedError(Exception):
    """A run failed; the traceback is in its log and on standard error already."""


def main(arguments: list[str]) -> int:
    sys.argv = [sys.argv[0], *arguments]
    # Exceptions come to us instead of being printed by Hydra with exit status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    run = hydra.main(version_base="1.3", config_path=str(project_conf()), config_name="train")(job)
    try:
        run()
    except (HydraException, OmegaConfBaseException):
        known = get_args_parser().parse_args(arguments)
        raise all_mistakes(known.overrides, known.config_dir) from None
    except RunFailedError:
        return 1
    return 0


class BeforeStart(Callback):
    """Hydra calls it when the config is composed and nothing has been written: what can't work is refused here."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        try:
            settings = read(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
            if not RunFolder(config.hydra.run.dir).is_finished():
                prepare(settings.data)
                require_accelerator(settings.trainer)
        except UserError as mistake:
            # Hydra turns a callback's exceptions into warnings, all but this one.
            print(f"nin train: {mistake}", file=sys.stderr)
            sys.exit(2)


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
    from nin.report import show_result, shown

    settings = read(config)
    folder = RunFolder(HydraConfig.get().runtime.output_dir)
    if folder.is_finished():
        print(f"{shown(folder.path)} is finished; to run it anew, give another name or remove the folder")
    else:
        overrides = list(HydraConfig.get().overrides.task)
        folder.write_asked(config, overrides)
        with logging_to(folder.log):
            _train(settings, folder, overrides)
    result = folder.read_result()
    show_result(folder, result)
    return result["metrics"]["val/acc"]


def _train(settings: Settings, folder: RunFolder, overrides: list[str]) -> None:
    from nin.experiment import train

    try:
        folder.write_result(train(settings, folder, overrides))
    except UserError:
        raise
    except Exception as error:
        logging.getLogger("nin").exception("the run failed")
        folder.write_result({"status": "failed", "error": f"{type(error).__name__}: {error}", "overrides": overrides})
        raise RunFailedError from error
