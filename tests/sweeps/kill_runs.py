"""Kills searches with real runs at random moments and compares them with undisturbed ones. ``kill_runs.py KILLS``.

Each start of a search is a process of its own, which runs ``nin train -m`` and is ended by SIGKILL at a random moment:
in a batch, in a checkpoint, in a proposal, while the study is written. It is forked from this process, which has
imported Lightning already. Of joblib's searches, either all processes are killed, or the first one alone, whose workers
then save and stop. The random ones have final seeds. Prints, as JSON, the number of kills and of trials that differ,
ran twice or are lost.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kill_search import describe

from helpers import SMALL, merge
from nin import cli
from nin.commands import train  # noqa: F401  # imported before the fork, as all that follow
from nin.data.sources import prepare
from nin.runs.folder import RunFolder
from nin.sweeps import launch, search, search_report, study, summary  # noqa: F401
from nin.training import experiment  # noqa: F401

SEARCH = Path("outputs/sweeps/search")
BEST = ("best.json", "best.yaml", "summary.csv")
TRIALS, PER_SEARCH = 7, 12  # of a search; the most kills of one search
SCENARIOS = [
    ("tpe", "hyperband", "basic"),
    ("tpe", "none", "basic"),
    ("random", "median", "basic"),
    ("random", "none", "basic"),
    ("tpe", "median", "joblib"),
    ("tpe", "none", "joblib"),
    ("random", "hyperband", "joblib"),
    ("random", "none", "joblib"),
]


def command(sampler: str, pruner: str, launcher: str, trials: int, data: Path) -> list[str]:
    words = [word for word in SMALL if "max_epochs" not in word and "dropout" not in word]
    words += ["callbacks=none", "threads=1", "trainer.max_epochs=3", "checkpoint.every_n_steps=2", f"data.root={data}"]
    words += ["optimizer.lr=tag(log, interval(1e-3, 1e6))", "model.dropout=interval(0, 0.8)"]  # some diverge
    words += ["hydra/sweeper=optuna", "name=search", f"hydra/launcher={launcher}", f"hydra.sweeper.n_trials={trials}"]
    words += [f"hydra.sweeper.sampler={sampler}", f"hydra.sweeper.pruner={pruner}"]
    words += ["hydra.sweeper.n_jobs=2"] if launcher == "joblib" else []
    return ["-m", *merge(words), *(["hydra.sweeper.final_seeds=[3,4]"] if sampler == "random" else [])]


def start(words: list[str]) -> int:
    """Starts the search in the working directory, in a session of its own; returns its process id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 70
    try:
        os.setsid()
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = cli.run("train", words)
        sys.stdout.flush()
    finally:
        os._exit(status)


def has_ended(child: int, seconds: float) -> bool:
    """Waits for at most ``seconds``; whether the process has ended by itself.

    Raises:
        AssertionError: if it failed.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, (os.waitstatus_to_exitcode(status), Path("output.txt").read_text()[-4000:])
            return True
        time.sleep(0.005)
    return False


def results() -> dict[Path, tuple[int, int]]:
    """The results that there are, each with what changes when it is written again."""
    stats = {path: path.stat() for path in SEARCH.glob("*/result.json")}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def read_all() -> dict[str, Any]:
    """All that a search has found: the study, the result of each trial and each final seed, the best trial."""
    found: dict[str, Any] = {f"trial-{number:04d}": [trial] for number, trial in describe(SEARCH).items()}
    for path in SEARCH.glob("*/result.json"):
        result = RunFolder(path.parent).read_result() or {}
        keys = ("status", "error", "metrics", "epochs", "steps", "weights_sha256", "best_weights_sha256", "seed")
        entry = found.setdefault(path.parent.name, [])
        scores = [
            {k: v for k, v in row.items() if k.startswith("val/")} for row in RunFolder(path.parent).read_epochs()
        ]
        entry += [{key: result.get(key) for key in keys}, scores]
    return found | {name: (SEARCH / name).read_text() for name in BEST if (SEARCH / name).exists()}


def run_search(words: list[str], kills: int, longest: float) -> tuple[dict[str, Any], int, int]:
    """Runs a search to its end in the working directory.

    Args:
        kills: the most times that it is killed.
        longest: time until a kill, in seconds.

    Returns:
        What it found, how often it was killed, and how many trials were trained again after they had a result.
    """
    killed = twice = 0
    before: dict[Path, tuple[int, int]] = {}
    while True:
        child = start(words)
        ended = has_ended(child, random.uniform(0, longest) if killed < kills else 600)
        if not ended:
            all_of_them = random.random() < 0.5
            (os.killpg if all_of_them else os.kill)(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
        now = results()
        for path in [path for path, value in before.items() if now.get(path) != value]:
            print(f"{path}: trained again, {RunFolder(path.parent).read_result()}", file=sys.stderr)
            twice += 1
        before = now
        if ended:
            return read_all(), killed, twice


def compare(scenario: tuple[str, str, str], kills: int, trials: int, data: Path) -> dict[str, Any]:
    """Runs one search undisturbed, and others that are killed until there were ``kills`` kills."""
    words = command(*scenario, trials, data)
    counts = dict.fromkeys(("kills", "searches", "differing", "twice", "lost", "other_best", "pruned", "failed"), 0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        begun = time.monotonic()
        expected = run_search(words, 0, 0)[0]
        seconds = time.monotonic() - begun
        os.chdir("/")
    names = [name for name in expected if name.startswith("trial-")]
    assert len(names) == trials
    assert ("best.json" in expected) == (scenario[0] == "tpe") != ("final_seeds" in words[-1])
    counts["pruned"], counts["failed"] = (
        sum(expected[name][0][0] == state for name in names) for state in ("PRUNED", "FAIL")
    )
    while counts["kills"] < kills:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            found, killed, twice = run_search(words, min(kills - counts["kills"], PER_SEARCH), seconds / 2)
            os.chdir("/")
        counts["kills"] += killed
        counts["searches"] += 1
        counts["twice"] += twice
        counts["lost"] += len(expected.keys() - found.keys())
        counts["differing"] += sum(
            found.get(name) != expected.get(name) for name in (found.keys() | expected.keys()) - {*BEST}
        )
        counts["other_best"] += any(found.get(name) != expected.get(name) for name in BEST)
        for name in found:
            if found[name] != expected.get(name):
                print(f"{name}: {found[name]}, not {expected.get(name)}", file=sys.stderr)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int, help="of each scenario")
    parser.add_argument("--scenarios", default=",".join(map(str, range(len(SCENARIOS)))), help="as in 0,4")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seed", type=int, default=random.getrandbits(32), help="of the kills")
    parser.add_argument("--data", type=Path, help="a folder with the garments; default: they are generated")
    args = parser.parse_args()
    random.seed(args.seed)
    print("seed", args.seed, file=sys.stderr)
    with tempfile.TemporaryDirectory() as generated:
        from nin.config.composition import compose_settings

        data = args.data or Path(generated)
        prepare(compose_settings([*SMALL, f"data.root={data}"]).data)
        for number in map(int, args.scenarios.split(",")):
            counts = compare(SCENARIOS[number], args.kills, args.trials, data)
            print(json.dumps({"/".join(SCENARIOS[number]): counts}), flush=True)
