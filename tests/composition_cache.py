"""Reads the files of ``conf/`` once, and composes the same config once: a composition takes a tenth of a second.

Every run composes the default config to name what differs from it, and every refused command line to find all errors.
What a test gets is a copy. Files in other folders, as in that of a test, are read as always, and configs of which a
part may be there are composed as always.
"""

import contextlib
import pickle
from collections.abc import Iterable, Iterator
from typing import Any, cast

import pytest
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig

from nin.config import composition
from nin.config.schema import CONF

read, compose = ConfigRepository.load_config, composition.compose


@contextlib.contextmanager
def cached_compositions() -> Iterator[None]:
    files: dict[tuple[str, str], bytes] = {}
    configs: dict[tuple[str, ...], bytes] = {}

    def read_once(repository: ConfigRepository, config_path: str) -> Any:
        source = repository._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or not _are_the_projects([source]):
            return read(repository, config_path)
        key = (source.path, config_path)
        if key not in files:
            files[key] = pickle.dumps(read(repository, config_path))
        return pickle.loads(files[key])

    def compose_once(config_name: str, overrides: list[str], with_hydra: bool) -> DictConfig:
        # The section hydra has the working directory.
        if with_hydra or not _are_the_projects(GlobalHydra.instance().config_loader().get_search_path().get_path()):
            return compose(config_name, overrides, with_hydra)
        words = (config_name, *overrides)
        if words not in configs:
            configs[words] = pickle.dumps(compose(config_name, overrides, with_hydra))
        return cast(DictConfig, pickle.loads(configs[words]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", read_once)
        patch.setattr(composition, "compose", compose_once)
        yield


def _are_the_projects(sources: Iterable[Any]) -> bool:
    """Whether there are no others than ``conf/`` and Hydra's own."""
    return {source.path.partition("://")[2] or source.path for source in sources} <= {
        *(str(CONF), "hydra.conf", "structured://", "")
    }
