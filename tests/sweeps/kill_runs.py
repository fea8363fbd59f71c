"""Kills searches with real runs at random moments and compares them with undisturbed ones. ``kill_runs.py KILLS``.

Each start of a search is a process of its own, which runs ``nin train -m`` and is ended by SIGKILL at a random moment:
in a batch, in a checkpoint, in a proposal, while the study is written. It is forked from this process, which has
imported Lightning already. Of joblib's searches, either all processes are killed, or the first one alone, whose workers
then save and stop. The random ones have final seeds.
"""

import functools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kills

from helpers import SMALL, merge
from nin import cli
from nin.commands import train  # noqa: F401  # imported before the fork, as all that follow
from nin.config.composition import compose_settings
from nin.data import sources
from nin.runs.folder import RunFolder
from nin.sweeps import launch, search, search_report, study, summary  # noqa: F401
from nin.training import experiment  # noqa: F401

SEARCH = Path("outputs/sweeps/search")
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
    found: dict[str, Any] = kills.describe(SEARCH)
    for path in SEARCH.glob("*/result.json"):
        folder = RunFolder(path.parent)
        result = folder.read_result() or {}
        keys = ("status", "error", "metrics", "epochs", "steps", "weights_sha256", "best_weights_sha256", "seed")
        scores = [{k: v for k, v in row.items() if k.startswith("val/")} for row in folder.read_epochs()]
        found.setdefault(path.parent.name, []).extend([{key: result.get(key) for key in keys}, scores])
    return found | {name: (SEARCH / name).read_text() for name in kills.BEST if (SEARCH / name).exists()}


def prepare(sampler: str, pruner: str, launcher: str, trials: int, data: Path) -> kills.RunSearch:
    words = command(sampler, pruner, launcher, trials, data)

    def run_search(most: int, seconds: float) -> kills.Found:
        killed = twice = 0
        before: dict[Path, tuple[int, int]] = {}
        while True:
            child = start(words)
            ended = has_ended(child, random.uniform(0, seconds / 2) if killed < min(most, PER_SEARCH) else 600)
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
                found = read_all()
                if most == 0:
                    assert ("best.json" in found) == (sampler == "tpe") != ("final_seeds" in words[-1])
                return found, killed, twice

    return run_search


if __name__ == "__main__":
    parser = kills.build_parser(SCENARIOS, TRIALS)
    parser.add_argument("--data", type=Path, help="a folder with the garments; default: they are generated")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as generated:
        data = args.data or Path(generated)
        sources.prepare(compose_settings([*SMALL, f"data.root={data}"]).data)
        kills.compare_all(SCENARIOS, args, functools.partial(prepare, data=data))
