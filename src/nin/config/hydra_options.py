"""Hydra's options on the command line, the folders in which it looks for configs, and the results of its jobs."""

import argparse
import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra.version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nin.config.errors import did_you_mean
from nin.config.keys import split_override
from nin.config.schema import CONF, UserError

SEARCH_PATH = "hydra.searchpath"
# The options that choose other configs than conf/train.yaml, by the keys of `find_config_options`.
_CONFIG_OPTIONS = {"config_dir": "--config-dir", "config_path": "--config-path", "config_name": "--config-name"}
WITHOUT_SPACE = "hydra.sweeper.params=null"  # a single run is refused where a file gives the space of a sweep


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parses Hydra's options. Settings are given as ``key=value``, without dashes.

    Raises:
        UserError: on an unknown option.
    """
    parser = get_args_parser()
    parser.prog = "nin train"  # for the usage in its messages
    parser.allow_abbrev = False  # `--experiment cpu` would be read as --experimental-rerun
    args, unknown = parser.parse_known_args(arguments)
    if wrong := [word for word in unknown if word.startswith("-")]:
        option = wrong[0].partition("=")[0]
        actions = [action for action in parser._actions if action.dest != "experimental_rerun"]  # noqa: SLF001  # no public list
        options = [option for action in actions for option in action.option_strings]
        raise UserError(
            f"{option}: no such option; settings are given without dashes, as in {option.lstrip('-') or 'seed'}=…; "
            f"{did_you_mean(option, options)}"
        )
    if args.experimental_rerun:
        raise UserError("--experimental-rerun: not supported; use nin resume RUN")
    args.overrides += unknown  # argparse leaves those out that follow an option
    return args


@contextlib.contextmanager
def open_hydra(
    config_dir: str | None = None, config_path: str | None = None, overrides: Iterable[str] = ()
) -> Iterator[Hydra]:
    """Hydra as ``hydra.main`` sets it up.

    Args:
        config_dir: a folder of the user's own configs, searched after ``conf/`` (``--config-dir``).
        config_path: replaces ``conf/`` (``--config-path``).
        overrides: those of the command line. ``hydra.searchpath=[…]`` adds folders also for configs that are composed
            without this override, as those of a sweep's jobs are when they are checked.

    Raises:
        UserError: if one of them is not a folder.
    """
    if config_dir and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir}: no such folder")
    if config_path and not Path(config_path).is_dir():
        raise UserError(f"--config-path {config_path}: no such folder")
    hydra.version.setbase("1.3")
    GlobalHydra.instance().clear()
    search_path = create_config_search_path(str(Path(config_path).absolute() if config_path else CONF))
    if config_dir:
        path = f"file://{Path(config_dir).absolute()}"
        search_path.prepend("command-line", path, SearchPathQuery(provider="schema", path=None))
    for path in _read_search_path(overrides):
        search_path.prepend(SEARCH_PATH, path, SearchPathQuery(provider="schema", path=None))
    try:
        yield Hydra.create_main_hydra2("nin", search_path)
    finally:
        GlobalHydra.instance().clear()


def _read_search_path(overrides: Iterable[str]) -> list[str]:
    """The folders of ``hydra.searchpath=[…]``; none if it is no list of texts, which Hydra reports."""
    for word in overrides:
        if word.lstrip("+").startswith(f"{SEARCH_PATH}="):
            with contextlib.suppress(HydraException):
                value = OverridesParser.create().parse_override(word).value()
                return value if isinstance(value, list) and all(isinstance(path, str) for path in value) else []
    return []


def find_config_options(hydra: Any) -> dict[str, str | None]:
    """The options that a command needs to compose the same config; None for those that it does not need.

    Args:
        hydra: the section ``hydra`` of the composed config, also as `HydraConfig.get` returns it.
    """
    sources = {source.provider: source.path for source in hydra.runtime.config_sources}
    words: Any = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    return {
        "config_dir": sources.get("command-line"),
        "config_path": sources["main"] if sources["main"] != str(CONF) else None,
        "config_name": hydra.job.config_name if hydra.job.config_name != "train" else None,
        "search_path": next((word for word in words if split_override(word)[0] == SEARCH_PATH), None),
    }


def format_config_options(found: Mapping[str, Any]) -> list[str]:
    """The words of a command for what `find_config_options` has found."""
    options = [word for key, option in _CONFIG_OPTIONS.items() if (own := found.get(key)) for word in (option, own)]
    return options + ([search_path] if (search_path := found.get("search_path")) else [])


def unwrap_job_result(job: JobReturn) -> Any:
    """Returns what a job returned, or raises what ended it.

    Hydra's own property also prints the overrides of a job that failed.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        return job.return_value
