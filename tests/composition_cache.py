"""Composes the same config once: a composition takes a tenth of a second.

Every run composes the default config to name what differs from it, and every refused command line to find all errors.
What a test gets is a copy. Configs of which a part may be in a folder of the test are composed as always.
"""

import contextlib
import pickle
from collections.abc import Iterator
from typing import cast

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from nin.config import composition
from nin.config.schema import CONF

compose = composition.compose


@contextlib.contextmanager
def cached_compositions() -> Iterator[None]:
    configs: dict[tuple[str, ...], bytes] = {}

    def compose_once(config_name: str, overrides: list[str], with_hydra: bool) -> DictConfig:
        words = (config_name, *overrides)
        # The section hydra has the working directory.
        if with_hydra or any("searchpath" in word for word in words) or not _is_conf_alone():
            return compose(config_name, overrides, with_hydra)
        if words not in configs:
            configs[words] = pickle.dumps(compose(config_name, overrides, with_hydra))
        return cast(DictConfig, pickle.loads(configs[words]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "compose", compose_once)
        yield


def _is_conf_alone() -> bool:
    """Whether no folder is searched for configs but ``conf/``, and Hydra's own."""
    sources = GlobalHydra.instance().config_loader().get_search_path().get_path()
    return {source.path for source in sources} <= {str(CONF), "pkg://hydra.conf", "structured://"}
