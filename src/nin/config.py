"""Composing ``conf/`` outside ``hydra.main``, and telling all mistakes in a command line at once."""

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nin.settings import Settings, UserError, meant, project_conf, read


def settings_from(arguments: list[str]) -> Settings:
    """The settings that a command line asks for.

    Raises:
        UserError: lists every mistake in it.
    """
    known, unknown = get_args_parser().parse_known_args(arguments)
    if unknown:
        raise UserError(f"no such option: {' '.join(unknown)}; settings are given as key=value")
    try:
        return read(composed(known.overrides, known.config_dir))
    except (HydraException, OmegaConfBaseException):
        raise UserError(all_mistakes(known.overrides, known.config_dir)) from None


def composed(overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """The config that Hydra composes from ``conf/``, the user's own ``config_dir`` and the overrides."""
    extra = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
    with initialize_config_dir(str(project_conf()), version_base="1.3"):
        return compose("train", overrides=extra + overrides)


def all_mistakes(overrides: list[str], config_dir: str | None = None) -> str:
    """Hydra stops at the first mistake in a command line; this goes on and lists the others, and the checks' too."""
    mistakes, good = [], []
    try:
        composed([], config_dir)
    except (HydraException, OmegaConfBaseException) as error:
        return _told("--config-dir", error)
    # Groups first: whether a key exists hangs on the option that was chosen.
    for override in sorted(overrides, key=lambda o: "." in o.partition("=")[0]):
        try:
            composed([*good, override], config_dir)
            good.append(override)
        except (HydraException, OmegaConfBaseException) as error:
            mistakes.append(_told(override, error))
    try:
        read(composed(good, config_dir))
    except UserError as more:
        mistakes.append(str(more))
    return "\n".join(mistakes)


def _told(override: str, error: Exception) -> str:
    """One mistake that Hydra found, in this project's form: what was typed, the rule, the remedy."""
    first = next(line for line in str(error).splitlines() if line)
    try:
        key = OverridesParser.create().parse_override(override).key_or_group
    except HydraException:
        return f"{override}: not of the form key=value ({first})"
    if first.startswith("Could not find"):
        options = [line.strip() for line in str(error).splitlines() if line.startswith("\t")]
        options = [o for o in options if not o.startswith(("'", "provider"))]
        value = override.partition("=")[2]
        return f"{override}: no such {key}; {meant(value, options)}"
    if first.startswith(("Could not override", "Key '")):
        *parents, last = key.lstrip("+~").split(".")
        node = composed([])
        for parent in parents:
            node = node.get(parent, {}) if isinstance(node, DictConfig) else {}
        known = [str(k) for k in node] if isinstance(node, DictConfig) else []
        return f"{override}: no such key '{key}'" + (f"; {meant(last, known)}" if known else "")
    cause = error.__cause__ or error
    return f"{override}: {str(cause).splitlines()[0]}"
