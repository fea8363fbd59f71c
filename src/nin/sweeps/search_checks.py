"""Checks a search before anything is written."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import FloatDistribution
from pydantic import AfterValidator, Field, ValidationError

from nin.config.changes import SAME_EXPERIMENT, experiment_values
from nin.config.composition import compose_settings
from nin.config.errors import format_errors
from nin.config.keys import is_within, split_override
from nin.config.networks import OwnModel
from nin.config.schema import CONF, FolderData, OwnData, Settings, UserError
from nin.config.types import Positive, Section
from nin.runs.console import format_path
from nin.sweeps.checks import check_jobs, once_per_unknown_key
from nin.sweeps.claims import require_postgresql
from nin.sweeps.space import Space, enumerate_values, overrides_of, read_space, sample_corners
from nin.sweeps.study import JOURNAL, Plan, open_database, open_journal, require_same_plan

# The keys of a folder of images that choose its decoded pixels; with another of them, the images differ on purpose.
_OF_IMAGES = ("data", *(f"data.{key}" for key in ("root", "stored_size", "fit", "channels", "skip_broken")))
_MAX_POINTS = 100_000  # Optuna lists all of them before each trial


def _require_different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("must have each seed once")
    return seeds


class SearchSettings(Section):
    """``hydra.sweeper`` of a search."""

    n_trials: Positive
    n_jobs: Positive
    sampler: Literal["tpe", "random", "cmaes", "qmc", "grid"]
    pruner: Literal["none", "median", "hyperband"]
    storage: Annotated[str, AfterValidator(require_postgresql)] | None
    max_failures: Positive | None
    final_seeds: (
        Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1), AfterValidator(_require_different)]
        | None
    )


def read_search_settings(config: DictConfig) -> SearchSettings:
    """The keys of ``hydra.sweeper``.

    Raises:
        UserError: lists every key with a wrong value.
    """
    plain = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    assert isinstance(plain, dict)
    own = {str(key): value for key, value in plain.items() if key not in ("_target_", "params")}
    try:
        return SearchSettings.model_validate(own)
    except ValidationError as error:
        raise UserError(*format_errors(error, SearchSettings, own, "hydra.sweeper.").values()) from error


def check_search(
    config: DictConfig, overrides: list[Override], settings: SearchSettings, on_this_machine: bool
) -> tuple[Plan, list[str], Settings]:
    """Checks a search before anything is written; `nin.sweeps.search.Search` describes the arguments.

    Returns:
        What the search is, the overrides that all trials share, and the settings of one point of the space.

    Raises:
        UserError: lists every error that is found.
    """
    if config.sweep.fail_fast:
        raise UserError("sweep.fail_fast=true: for a search, set hydra.sweeper.max_failures=1 instead")
    space, fixed = read_space(overrides)
    if not space:
        raise UserError(
            "a search has no space: give at least one key as in 'optimizer.lr=tag(log, interval(1e-4, 1e-1))', "
            "model.dropout='interval(0, 0.8)' or model.norm=none,batch"
        )
    if any(split_override(key)[0] == "seed" for key in space):
        raise UserError(
            "seed: is not searched, because the best one says nothing; use hydra.sweeper.final_seeds=[0,1,2]"
        )
    points = _check_space(space, fixed, on_this_machine, config.hydra.job.config_name)
    if settings.final_seeds is not None and not points[0].sweep.test:
        raise UserError("sweep.test=false: the runs of hydra.sweeper.final_seeds are tested; leave one of the two out")
    _require_held_out_images(points[0])
    _require_validation_at_an_end(points[0])
    plan = _plan(config, space, fixed, settings, points)
    folder = Path(config.hydra.sweep.dir)
    if settings.storage is not None:
        require_same_plan(open_database(settings.storage), plan, folder)
    elif (folder / JOURNAL).exists():
        require_same_plan(open_journal(folder / JOURNAL), plan, folder)
    return plan, fixed, points[0]


def _plan(config: DictConfig, space: Space, fixed: list[str], settings: SearchSettings, points: list[Settings]) -> Plan:
    """Returns everything about the search that must stay the same under its name.

    Args:
        fixed: the overrides that all trials share.
        points: the settings of several points of the space.
    """
    max_epochs = {point.trainer.max_epochs for point in points}
    (epochs,) = max_epochs if len(max_epochs) == 1 else (None,)
    main = next(source.path for source in config.hydra.runtime.config_sources if source.provider == "main")
    # All settings, and not only the words: a file of the user's own may have been edited since.
    values = experiment_values(points[0])
    # A run may be resumed with another precision, but accuracies of several precisions are not compared.
    values["trainer.precision"] = points[0].trainer.precision
    if isinstance(data := points[0].data, FolderData) and not {*_OF_IMAGES} & {*space}:
        from nin.data.splits import open_folder  # needs torch, which the checks of the jobs have imported

        cache = open_folder(data)
        values["images_sha256"], values["images"] = cache.fingerprint, dict(cache.counts)
    # As a command line has them: null and true.
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    own = [f"{key}={text}" for key, text in texts.items() if not is_within(key, [*space])]
    return Plan(
        name=str(config.name),
        space=space,
        sampler=settings.sampler,
        seed=config.seed,
        pruner=settings.pruner,
        batch_size=settings.n_jobs,
        fixed=(*experiment_words(fixed), *own),
        max_epochs=epochs if epochs and epochs > 0 else None,
        config_name=config.hydra.job.config_name,
        config_path=format_path(Path(main)) if main != str(CONF) else None,
    )


def experiment_words(words: Iterable[str]) -> list[str]:
    """The overrides that make a trial the experiment that it is, sorted; the others may change under one name."""
    # `sweep=…` is the file that the space and other settings come from; sweep.test and the like are not. The group
    # `trainer` chooses where a trial trains; what else it sets is compared with the other settings.
    keys = {word: split_override(word)[0] for word in words}
    same = [*SAME_EXPERIMENT, "hydra"]
    return sorted(w for w, key in keys.items() if key == "sweep" or not (key == "trainer" or is_within(key, same)))


def count_points(plan: Plan) -> int:
    """The number of points of a grid. Raises UserError if they are infinitely many, or more than `_MAX_POINTS`."""
    count = math.prod(len(enumerate_values(key, values)) for key, values in plan.space.items())
    if count > _MAX_POINTS:
        raise UserError(
            f"hydra.sweeper.sampler=grid: has {count:,} points; give fewer values, for at most {_MAX_POINTS:,}, or "
            "another sampler"
        )
    return count


def _check_space(space: Space, fixed: list[str], on_this_machine: bool, config_name: str) -> list[Settings]:
    """Validates points at the ends of the space. A combination that is refused there may be accepted elsewhere.

    Returns:
        The settings of the points that are accepted.

    Raises:
        UserError: with the errors of the first point if all are refused, or of the keys that can't have a value.
    """
    errors: list[tuple[str, ...]] = []
    checked: list[Settings] = []
    for point in sample_corners(space):
        try:
            words = [*fixed, *overrides_of(point)]
            if checked:  # the data and the devices are the same
                checked.append(compose_settings(words, config_name=config_name))
                if isinstance(checked[-1].model, OwnModel):
                    from nin.networks.build import require_buildable  # needs torch, which `check_jobs` has imported

                    require_buildable(checked[-1])
            else:
                checked += check_jobs([words], on_this_machine, config_name)
        except UserError as error:
            errors.append(error.errors)
    keys = [key.lstrip("+") for key in space]  # as messages name them
    outside = [e for found in errors for e in found if any(e.startswith((f"{k}=", f"{k}: no ")) for k in keys)]
    outside = [_with_integers(error, space) for error in outside]
    if outside:
        raise UserError(*once_per_unknown_key(outside))
    if not checked:
        raise UserError(*errors[0])
    return checked


def _with_integers(error: str, space: Space) -> str:
    """``error`` with the remedy for an interval of numbers where whole numbers are needed."""
    key = next((key for key in space if error.startswith(f"{key.lstrip('+')}=")), "")
    if not (isinstance(values := space.get(key), FloatDistribution) and "must be a valid integer" in error):
        return error
    return f"{error}; whole numbers are '{key}=tag(int, interval({values.low:g}, {values.high:g}))'"


def _require_held_out_images(settings: Settings) -> None:
    data: Any = settings.data
    if isinstance(data, OwnData):
        return  # its validation images are not known before it is built
    # A folder may have them in val/; it is read later.
    held_out = isinstance(data, FolderData) or data.val_size
    if data.score_each_epoch != "val" or not held_out or settings.trainer.limit_val_batches == 0:
        raise UserError(
            "a search compares val/acc on held-out images: it needs data.score_each_epoch=val, data.val_size above 0 "
            "and trainer.limit_val_batches above 0"
        )


def _require_validation_at_an_end(settings: Settings) -> None:
    """Raises UserError if no epoch ends with a validation: a trial's value is val/acc at the end of an epoch."""
    trainer = settings.trainer
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else math.inf
    if every and every > epochs:
        raise UserError(
            f"trainer.check_val_every_n_epoch={every}: a trial has {epochs} epochs, so none would end with a "
            "validation, and a search compares val/acc; choose at most that"
        )
    if interval not in (None, 1):  # of all others, only some meet the end of an epoch
        raise UserError(
            f"trainer.val_check_interval={interval}: a search compares val/acc at the end of epochs, which might end "
            "without a validation; leave trainer.val_check_interval out"
        )
