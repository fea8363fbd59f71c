"""Searches that are killed end like undisturbed ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ENVIRONMENT

HERE = Path(__file__).parent
FAULTS = ("differing", "twice", "lost")


def count_kills(script: str, *arguments: str) -> list[dict[str, int]]:
    """Runs ``script`` and returns the counts of its scenarios."""
    environment = ENVIRONMENT | {"PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # the seed, with which a failure can be repeated
    return [counts for line in done.stdout.splitlines() for counts in json.loads(line).values()]


def test_searches_that_are_killed_propose_the_same_trials() -> None:
    (counts,) = count_kills("kill_search.py", "4", "--scenarios", "0")
    assert counts["kills"] >= 4
    assert counts["pruned"] > 0
    assert [counts[key] for key in FAULTS] == [0, 0, 0]


@pytest.mark.long
def test_two_hundred_kills_of_searches_without_training() -> None:
    found = count_kills("kill_search.py", "19")
    assert sum(counts["kills"] for counts in found) >= 200
    assert [[counts[key] for key in FAULTS] for counts in found] == [[0, 0, 0]] * len(found)
    assert all(sum(counts[key] for counts in found) > 0 for key in ("pruned", "failed"))


@pytest.mark.long
def test_searches_with_real_runs_that_are_killed_end_with_the_same_best(data_root: Path) -> None:
    found = count_kills("kill_runs.py", "3", "--trials", "5", "--data", str(data_root))
    assert sum(counts["kills"] for counts in found) >= 24
    assert [[counts[key] for key in (*FAULTS, "other_best")] for counts in found] == [[0, 0, 0, 0]] * len(found)
    assert all(sum(counts[key] for counts in found) > 0 for key in ("pruned", "failed"))
