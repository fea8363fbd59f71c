"""Compares killed searches with undisturbed ones, for `kill_search.py` and `kill_runs.py`."""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nin.sweeps.study import JOURNAL, open_journal

BEST = ("best.json", "best.yaml", "summary.csv")
COUNTS = ("kills", "searches", "differing", "twice", "lost", "other_best", "pruned", "failed")

# What a search has found, by the name of a trial or file, how often it was killed, and how many trials ran twice.
Found = tuple[dict[str, Any], int, int]
# Runs a search to its end in the working directory. It is killed at most so many times, in half of so many seconds.
RunSearch = Callable[[int, float], Found]


def build_parser(scenarios: Sequence[Any], trials: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int, help="of each scenario")
    parser.add_argument("--scenarios", default=",".join(map(str, range(len(scenarios)))), help="as in 0,4")
    parser.add_argument("--trials", type=int, default=trials, help="of each search")
    parser.add_argument("--seed", type=int, default=random.getrandbits(32), help="of the kills")
    return parser


def compare_all(scenarios: Sequence[Any], args: argparse.Namespace, prepare: Callable[..., RunSearch]) -> None:
    """Prints, as a line of JSON for each scenario, the number of kills and of trials that differ, ran twice, …"""
    random.seed(args.seed)
    print("seed", args.seed, file=sys.stderr)
    for scenario in (scenarios[int(number)] for number in args.scenarios.split(",")):
        counts = compare(prepare(*scenario, args.trials), args.trials, args.kills)
        print(json.dumps({"/".join(map(str, scenario)): counts}), flush=True)


def compare(run_search: RunSearch, trials: int, kills: int) -> dict[str, int]:
    """Runs one search undisturbed, and others that are killed until there were ``kills`` kills."""
    begun = time.monotonic()
    expected, *_ = in_new_folder(run_search, 0, 0.0)
    seconds = time.monotonic() - begun
    states = [found[0][0] for name, found in expected.items() if name.startswith("trial-")]
    assert len(states) == trials
    counts = dict.fromkeys(COUNTS, 0) | {"pruned": states.count("PRUNED"), "failed": states.count("FAIL")}
    while counts["kills"] < kills:
        found, killed, twice = in_new_folder(run_search, kills - counts["kills"], seconds)
        counts["kills"] += killed
        counts["searches"] += 1
        counts["twice"] += twice
        counts["lost"] += len(expected.keys() - found.keys())
        differing = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
        counts["differing"] += len(differing - {*BEST})
        counts["other_best"] += not differing.isdisjoint(BEST)
        for name in differing:
            print(f"{name}: {found.get(name)}, not {expected.get(name)}", file=sys.stderr)
    return counts


def in_new_folder(run_search: RunSearch, kills: int, seconds: float) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = run_search(kills, seconds)
        os.chdir("/")
    return found


def describe(folder: Path) -> dict[str, list[Any]]:
    """All that a study has of each trial, except times, and CMA-ES's pickled state: equal states have several forms."""
    storage = open_journal(folder / JOURNAL)
    (study,) = storage.get_all_studies()
    trials = storage.get_all_trials(study._study_id)
    return {
        f"trial-{trial.number:04d}": [[
            trial.state.name, trial.value, trial.params, trial.intermediate_values, trial.user_attrs,
            {key: value for key, value in trial.system_attrs.items() if not key.startswith("cma:optimizer")},
        ]] for trial in trials
    }  # fmt: skip
