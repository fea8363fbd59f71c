"""Composing ``conf/`` outside ``hydra.main``, and telling all errors in a command line at once."""

import contextlib
import warnings

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nin.config.schema import Settings, UserError, is_within, project_conf
from nin.config.validation import did_you_mean, validate

# conf/hydra/launcher has the launchers' own names, and their own schemas fill in the keys that it leaves out.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


def compose_settings(arguments: list[str]) -> Settings:
    """The settings that a command line asks for.

    Raises:
        UserError: lists every mistake in it.
    """
    known, unknown = get_args_parser().parse_known_args(arguments)
    if unknown:
        raise UserError(f"no such option: {' '.join(unknown)}; settings are given as key=value")
    try:
        return validate(compose_config(known.overrides, known.config_dir))
    except (HydraException, OmegaConfBaseException) as error:
        raise collect_errors(error, known.overrides, known.config_dir) from None


def apply_overrides(
    settings: Settings, overrides: list[str], may_change: tuple[str, ...], first: list[str] | None = None
) -> Settings:
    """``settings`` of an earlier run with some keys set anew; ``trainer=cpu`` sets where it trains.

    ``first`` are the overrides that the earlier run was started with: its groups may have keys that others lack.

    Raises:
        UserError: lists every mistake, and every key that is not among ``may_change`` (prefixes).
    """
    try:
        asked = compose_config([*(first or []), *overrides])
        parsed = OverridesParser.create().parse_overrides(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise collect_errors(error, overrides) from None
    config = OmegaConf.create(settings.model_dump(mode="json"))
    for override in parsed:
        # A trainer is chosen for where it trains; how long the earlier run was to be is left alone.
        device = [f"trainer.{key}" for key in ("accelerator", "strategy", "devices")]
        for key in device if override.key_or_group == "trainer" else [override.key_or_group]:
            if not is_within(key, may_change):
                raise UserError(f"{override.input_line}: can't be changed here; these can: {', '.join(may_change)}")
            if override.is_delete():
                parent, _, last = key.rpartition(".")
                there = OmegaConf.select(config, parent) if parent else config
                if there:  # the earlier run may never have had it
                    there.pop(last, None)
            else:
                OmegaConf.update(config, key, OmegaConf.select(asked, key), merge=False)
    return validate(config)


def compose_config(overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """The config that Hydra composes from ``conf/``, the user's own ``config_dir`` and the overrides."""
    if GlobalHydra.instance().is_initialized():  # within a Hydra command, whose search path has them all
        return compose("train", overrides=overrides)
    extra = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
    with initialize_config_dir(str(project_conf()), version_base="1.3"):
        return compose("train", overrides=extra + overrides)


def collect_errors(first: Exception, overrides: list[str], config_dir: str | None = None) -> UserError:
    """Hydra stops at the ``first`` mistake in a command line; this lists the others too, and what the checks find."""
    errors, good = [], []
    try:
        compose_config([], config_dir)
    except (HydraException, OmegaConfBaseException) as error:
        return UserError(f"--config-dir {config_dir}: {_first_line(error)}")
    # Groups first: whether a key exists hangs on the option that was chosen.
    for override in sorted(overrides, key=lambda o: "." in o.partition("=")[0]):
        try:
            compose_config([*good, override], config_dir)
            good.append(override)
        except (HydraException, OmegaConfBaseException) as error:
            errors.append(_told(override, error, compose_config(good, config_dir)))
    try:
        validate(compose_config(good, config_dir))
    except UserError as more:
        errors += more.errors
    return UserError(*(errors or [_first_line(first)]))


def first_job_overrides(overrides: list[str]) -> list[str]:
    """A sweep's overrides with the first value of each that has several."""
    job = []
    for word in overrides:
        with contextlib.suppress(HydraException):  # a word that is no override stays, to be told as a mistake
            override = OverridesParser.create().parse_override(word)
            if override.is_discrete_sweep():
                word = f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        job.append(word)
    return job


def _told(override: str, error: Exception, config: DictConfig) -> str:
    """One mistake that Hydra found, in this project's form: what was typed, the rule, the remedy."""
    try:
        key = OverridesParser.create().parse_override(override).key_or_group
    except HydraException:
        return f"{override}: not of the form key=value ({_first_line(error)})"
    if "Could not find" in str(error):
        # The options stand in tabs; so do the search path's entries, provider=…, path=….
        options = [line.strip() for line in str(error).splitlines() if line.startswith("\t") and "=" not in line]
        return f"{override}: no such {key}; {did_you_mean(override.partition('=')[2], options)}"
    if _first_line(error).startswith(("Could not override", "Key '")):
        parent, _, last = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        known = [str(name) for name in node] if isinstance(node, DictConfig) else []
        return f"{override}: no such key" + (f"; {did_you_mean(last, known)}" if known else "")
    return f"{override}: {_first_line(error.__cause__ or error)}"


def _first_line(error: BaseException) -> str:
    return next(line for line in str(error).splitlines() if line)
