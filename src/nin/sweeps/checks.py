"""The jobs of a sweep are checked before the first one starts."""

import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import DictConfig

from nin.config.composition import compose_settings
from nin.config.schema import OwnClass, OwnData, Settings, Trainer, UserError, is_single_process
from nin.data.sources import describe, prepare
from nin.runs.console import log_to
from nin.runs.imports import lightning_imports
from nin.system.devices import require_accelerator

# The packages of each launcher.
_PACKAGES = {
    "hydra_joblib_launcher": "hydra-joblib-launcher joblib",
    "hydra_submitit_launcher": "hydra-submitit-launcher submitit",
    "hydra_ray_launcher": "hydra-ray-launcher ray",
}
# The modules that a search imports, with the names of the packages to install.
_SEARCH_PACKAGES = {"optuna": "optuna", "cmaes": "cmaes", "scipy": "scipy", "sklearn": "scikit-learn"}


def require_launcher(target: str) -> None:
    """Raises UserError, with the line that installs it, if the package of a Hydra launcher is missing."""
    plugin = next((name for name in _PACKAGES if name in target), None)
    if plugin is None:
        return
    try:
        found = importlib.util.find_spec(f"hydra_plugins.{plugin}")
    except ModuleNotFoundError:  # no plugin of Hydra is installed
        found = None
    if not found:
        raise UserError(
            f"hydra/launcher: its package is not installed; run: python3 -m pip install {_PACKAGES[plugin]}"
        )


def require_search_packages() -> None:
    """Raises UserError, with the line that installs them, if packages of a search are missing."""
    if missing := [name for module, name in _SEARCH_PACKAGES.items() if not importlib.util.find_spec(module)]:
        raise UserError(
            f"a search needs packages that are not installed: {', '.join(missing)}; run: python3 -m pip install "
            f"{' '.join(_SEARCH_PACKAGES.values())}"
        )


def require_joblib_arguments(launcher: DictConfig) -> None:
    """Raises UserError for wrong arguments of the joblib launcher, which reads them when it starts the jobs."""
    from joblib import Parallel

    arguments = {str(key): launcher[key] for key in launcher if key != "_target_"}
    if arguments.get("n_jobs") == 0:
        raise UserError("hydra.launcher.n_jobs=0: must be 1 or more, or -1 for the number of cores")
    if arguments.get("backend") not in (None, "loky"):
        raise UserError(
            f"hydra.launcher.backend={arguments['backend']}: must be loky or null; jobs can't share a process"
        )
    if arguments.get("timeout") is not None:
        raise UserError(f"hydra.launcher.timeout={arguments['timeout']:g}: must be null; trainer.max_time limits a job")
    if not re.fullmatch(r"all|\d+|(\d+ ?\* ?)?n_jobs", pre_dispatch := str(arguments.get("pre_dispatch", "all"))):
        raise UserError(f"hydra.launcher.pre_dispatch={pre_dispatch}: must be all, a number or n_jobs")
    batch_size = str(arguments.get("batch_size", "auto"))
    try:
        Parallel(
            **arguments | {"backend": "loky", "batch_size": int(batch_size) if batch_size.isdigit() else batch_size}
        )
    except ValueError as error:
        raise UserError(f"hydra.launcher: {error}") from None


def check_jobs(jobs: list[list[str]], on_this_machine: bool, config_name: str = "train") -> list[Settings]:
    """Composes and validates all jobs, tries their networks and losses, prepares their data, and has Lightning check
    their Trainer arguments.

    Args:
        jobs: the overrides of each job.
        on_this_machine: whether the jobs run here, so that this machine needs the accelerators that they request.
        config_name: of the config that the jobs start from.

    Raises:
        UserError: with the errors of all jobs.
    """
    checked = _compose_jobs(jobs, config_name)
    with lightning_imports():
        from nin.data.splits import require_training_images
        from nin.networks.build import require_buildable
        from nin.training.loss import require_known_loss
        from nin.training.optimizers import require_known_schedule
    # A check that takes torch, a download or a second runs once for all jobs with equal values of what it checks.
    checks: list[tuple[Callable[[Settings], None], Callable[[Settings], Any]]] = [
        (require_buildable, lambda job: (job.model, job.data.image_size)),
        (require_known_loss, lambda job: (job.loss, job.label_smoothing)),
        (require_known_schedule, lambda job: job.schedule),
        (lambda job: prepare(job.data), lambda job: job.data),
        (lambda job: require_training_images(job.data, job.seed), lambda job: (job.data, job.seed)),
        (_build_own_parts, lambda job: (job.model, job.loss, job.optimizer, job.data)),
    ]
    if on_this_machine:
        checks.append((_try_trainer, lambda job: (job.trainer, job.logger, job.callbacks)))
    for check, parts_of in checks:
        tried: list[Any] = []
        errors: dict[str, None] = {}
        for settings in checked:
            if (parts := parts_of(settings)) in tried:
                continue
            tried.append(parts)
            try:
                check(settings)
            except UserError as error:
                errors |= dict.fromkeys(error.errors)
        if errors:
            raise UserError(*errors)
    return checked


def _compose_jobs(jobs: list[list[str]], config_name: str) -> list[Settings]:
    errors: dict[str, None] = {}
    composed: list[Settings] = []
    for job in jobs:
        # A key that is unknown is reported once. To look for it in each job again would take a second per job.
        unknown = {key for error in errors if (key := _unknown_key(error))}
        try:
            words = [word for word in job if word.partition("=")[0] not in unknown]
            settings = compose_settings(words, config_name=config_name)
            _require_one_process(settings.trainer)
            composed.append(settings)
        except UserError as error:
            errors |= dict.fromkeys(error.errors)
    if errors:
        raise UserError(*once_per_unknown_key(errors))
    return composed


def once_per_unknown_key(errors: Iterable[str]) -> list[str]:
    """``errors`` of several jobs without repetitions: a misspelled key is reported with its first value only."""
    once: dict[str, str] = {}
    for error in errors:
        once.setdefault(_unknown_key(error) or error, error)
    return list(once.values())


def _unknown_key(error: str) -> str | None:
    """The key of the message ``key=value: no such key``."""
    given, is_unknown, _ = error.partition(": no such key")
    return given.partition("=")[0] if is_unknown else None


def _require_one_process(trainer: Trainer) -> None:
    if not is_single_process(trainer):
        raise UserError(
            f"trainer.strategy={trainer.strategy}, trainer.devices={trainer.devices}, trainer.num_nodes="
            f"{trainer.num_nodes}: a job of a sweep has one device, because each further process would start the whole "
            "sweep. Use trainer=gpu hydra/launcher=joblib for one job per GPU, several at once; or start single runs: "
            "for seed in 0 1 2; do nin train trainer=ddp seed=$seed name=seed-$seed; done"
        )


def _build_own_parts(settings: Settings) -> None:
    """Builds a network, an optimizer and a loss of the user's own. With data of their own, only a run does so."""
    own = [isinstance(part, OwnClass) for part in (settings.model, settings.loss, settings.optimizer)]
    if isinstance(settings.data, OwnData) or not any(own):
        return
    from nin.networks.build import require_complete_state
    from nin.training.classifier import Classifier
    from nin.training.optimizers import build_optimizer

    found = describe(settings.data)
    module = Classifier(settings, found.class_names, found.channels)
    require_complete_state(module.network, settings, module.in_channels, module.num_classes)
    build_optimizer(settings, module.network.parameters(), module.device)


def _try_trainer(settings: Settings) -> None:
    from nin.training.trainer import build_trainer

    require_accelerator(settings.trainer)
    with log_to(None):
        build_trainer(settings, None)
