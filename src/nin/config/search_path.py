"""The folders in which Hydra looks for configs: ``conf/``, and those of the command line's options."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import hydra.version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra

from nin.config.schema import CONF, UserError


@contextlib.contextmanager
def open_hydra(config_dir: str | None = None, config_path: str | None = None) -> Iterator[Hydra]:
    """Hydra as ``hydra.main`` sets it up.

    Args:
        config_dir: a folder of the user's own configs, searched after ``conf/`` (``--config-dir``).
        config_path: replaces ``conf/`` (``--config-path``).

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
    try:
        yield Hydra.create_main_hydra2("nin", search_path)
    finally:
        GlobalHydra.instance().clear()
