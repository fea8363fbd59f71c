"""The best configuration of a search: as a command, as a file, and its test."""

import contextlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.trial import FrozenTrial

from nin.config.composition import parse_overrides
from nin.config.hydra_options import WITHOUT_SPACE, format_config_options
from nin.config.keys import split_override
from nin.config.schema import CONF, Settings, UserError
from nin.config.types import Section
from nin.data.sources import prepare
from nin.runs.console import format_name_override, format_path, log_to
from nin.runs.files import read_text, write_atomically
from nin.runs.folder import RunFolder
from nin.sweeps.space import overrides_of
from nin.sweeps.study import trial_name
from nin.system.devices import require_accelerator


class SearchFile(Section):
    """``search.json``: what the report needs to know of the search's command."""

    name: str
    fixed: list[str]  # the overrides that all trials share
    n_trials: int
    max_epochs: int | None = None
    final_seeds: list[int] | None = None
    storage: str | None = None
    # Options of the command that choose other configs than conf/train.yaml, and its override hydra.searchpath=[…].
    config_dir: str | None = None
    config_path: str | None = None
    config_name: str | None = None
    search_path: str | None = None
    in_files: bool = False  # whether a file gives the space, or a part of it


def write_search_file(folder: Path, search: SearchFile) -> None:
    # Not by pydantic, which refuses to write paths that are not UTF-8.
    write_atomically(folder / "search.json", json.dumps(search.model_dump(), indent=2) + "\n")


def read_search_file(folder: Path) -> SearchFile:
    """What `write_search_file` wrote; the file may come from elsewhere.

    Raises:
        UserError: if it can't be read, or has other content.
    """
    path = folder / "search.json"
    try:
        return SearchFile.model_validate(json.loads(read_text(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read; run the search's own command again, which writes it") from error


def best_command(search: SearchFile, best: FrozenTrial) -> str:
    """The command that trains the configuration of the ``best`` trial alone."""
    words = [*format_config_options(search.model_dump()), format_name_override(f"{search.name}-best")]
    words += [word for word in search.fixed if not re.match(r"\+*(name=|hydra)", word)]
    words += [*overrides_of(best.params), *([WITHOUT_SPACE] if _has_space_in_file(search) else [])]
    return shlex.join(["nin", "train", *words])


def fits_config_file(search: SearchFile) -> bool:
    """Whether best.yaml can hold the best configuration: it deletes no key, and needs no other config."""
    return not (format_config_options(search.model_dump()) or any(word.startswith("~") for word in search.fixed))


def best_config(search: SearchFile, best: FrozenTrial) -> str:
    """The best configuration as a file that ``--config-name`` takes: only what differs from ``conf/train.yaml``."""
    values = OmegaConf.create()
    groups: list[str] = []
    for override in parse_overrides([*search.fixed, *overrides_of(best.params)]):
        key = override.key_or_group
        if key.split(".")[0] in ("name", "hydra") or key.startswith(("sweep.", "hydra/")):
            continue
        if "." not in key and (CONF / key).is_dir():
            groups.append(f"  - override {key}: {override.get_value_element_as_str()}\n")
        else:
            OmegaConf.update(values, key, override.value(), force_add=True)
    OmegaConf.update(values, "name", f"{search.name}-best")
    if _has_space_in_file(search):
        OmegaConf.update(values, "hydra", {"sweeper": {"params": None}}, force_add=True)
    header = (
        f"# The best of the search {search.name}: {trial_name(best.number)}, val/acc {best.value:.4f}.\n"
        "# @package _global_\n"
    )
    return f"{header}defaults:\n  - train\n{''.join(groups)}  - _self_\n{OmegaConf.to_yaml(values)}"


def _has_space_in_file(search: SearchFile) -> bool:
    """Whether a file may give the space: that of ``sweep=…``, one of ``--config-name``, or any other."""
    has_sweep = any(split_override(word)[0] == "sweep" for word in search.fixed)
    return has_sweep or search.in_files or bool(search.config_name)


def test_best(folder: Path, best: FrozenTrial, settings: Settings) -> None:
    """Tests the best trial's best checkpoint once; ``best.json`` has the result.

    Args:
        settings: of that trial, as the search's command has them: a config in ``folder`` may come from elsewhere.
    """
    path, run = folder / "best.json", RunFolder(folder / trial_name(best.number))
    if read_test(folder, best):
        return
    if not run.best.exists():
        print(
            f"{format_path(run.best)}: not found, so the best trial is not tested; where it was trained, nin eval can "
            "test it, or train it again with the command below"
        )
        return
    try:
        require_accelerator(settings.trainer)  # a machine that only submits the trials may lack it
    except UserError as error:
        print(f"{error}, so the best trial is not tested; the same command on a machine with the accelerator tests it")
        return
    from nin.checkpoints.files import read
    from nin.training.evaluation import evaluate_weights

    with log_to(None):
        prepare(settings.data)
        metrics, confusion = evaluate_weights(settings, read(run.best))
    weights = (run.read_result() or {}).get("best_weights_sha256")
    content = {"trial": best.number, "weights_sha256": weights, "metrics": metrics, "test_images": int(confusion.sum())}
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_test(folder: Path, best: FrozenTrial) -> dict[str, Any] | None:
    """The test of the best trial, None if there is none, or if it is of a trial of an earlier search in this folder."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError, UserError):
        tested = json.loads(read_text(folder / "best.json"))
        result = RunFolder(folder / trial_name(best.number)).read_result()
        same = result is None or tested["weights_sha256"] == result["best_weights_sha256"]
        if tested["trial"] == best.number and same:
            return tested
    return None
