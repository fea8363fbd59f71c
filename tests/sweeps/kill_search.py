"""Kills searches at their writes and compares them with undisturbed ones. ``python kill_search.py KILLS``.

Only the training is replaced: a job writes the files that a run writes, with val/acc computed from its overrides. Each
search is a forked process that kills itself at a random write, also with half a line of the journal written, and is
started again.
"""

import functools
import hashlib
import json
import math
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import kills
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from optuna.storages.journal import JournalFileBackend

from nin.commands import train
from nin.config.composition import compose_settings, parse_overrides
from nin.config.hydra_options import open_hydra
from nin.runs.files import write_atomically
from nin.runs.folder import RunFolder
from nin.sweeps import search, search_checks
from nin.sweeps.study import JOURNAL
from nin.training.pruning import TrialPruner
from nin.training.run import RunFailedError

EPOCHS, TRIALS = 4, 14
SPACE = ["optimizer.lr=tag(log, interval(1e-4, 1e-1))", "model.dropout=interval(0, 0.8)", "model.norm=none,batch"]
SCENARIOS = [
    ("tpe", "median", 3),
    *((sampler, pruner, n) for sampler in ("random", "tpe") for pruner in ("none", "median") for n in (1, 3)),
    ("tpe", "hyperband", 1),
    ("cmaes", "none", 1),
    ("qmc", "none", 3),
]


def val_acc(words: list[str], epoch: int) -> float:
    digits = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    lr = float(dict(word.split("=", 1) for word in words)["optimizer.lr"])
    level = 1 / (1 + (math.log10(lr) + 2.5) ** 2) + int(digits[:4], 16) / 2**20
    return round(level * (1 - 0.5**epoch), 7)


class Jobs:
    """Hydra's launcher: the jobs of a batch advance by one epoch in a random order, as if they ran at once."""

    def launch(self, jobs: list[list[str]], initial_job_idx: int) -> list[Any]:
        order = [job for job in jobs for _ in range(EPOCHS + 1)]
        random.shuffle(order)
        for job in order:
            self.advance([word for word in job if "hydra.sweep" not in word], Path("search", job[-1].split("=")[1]))
        return [None] * len(jobs)

    def advance(self, words: list[str], path: Path) -> None:
        folder = RunFolder(path)
        if folder.result.exists():
            return
        write_atomically(folder.overrides, json.dumps(words))
        rows = folder.read_epochs()
        pruner = TrialPruner(path) if (path / ".hydra" / "comparison.json").exists() else None
        scores = {int(row["epoch"]): row["val/acc"] for row in rows}
        ended = bool(pruner and scores and pruner.report(scores, EPOCHS))
        failed = len(rows) == 2 and val_acc(words, 9) * 1e7 % 5 < 1
        if ended or failed or len(rows) == EPOCHS:
            status = "pruned" if ended else "failed" if failed else "finished"
            scored = {"val/acc": max(scores.values()), "val/loss": 1.0}
            folder.write_result({"status": status, "error": "diverged", "metrics": scored, "overrides": words})
            with Path("ended").open("a") as file:
                file.write(f"{path.name}\n")
            return
        epoch = len(rows) + 1
        scores[epoch] = val_acc(words, epoch)
        lines = [f"{number},{score}" for number, score in scores.items()]
        write_atomically(folder.metrics, "\n".join(["epoch,val/acc", *lines, ""]))


def kill_at(event: int) -> None:
    """Kills this process at the ``event``-th write from now: before it, within or after it."""
    left, real_append, real_fsync = event, JournalFileBackend.append_logs, os.fsync

    def is_due() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def fsync(descriptor: int) -> None:
        if is_due():
            os.kill(os.getpid(), signal.SIGKILL)
        real_fsync(descriptor)

    def append(backend: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        if is_due():
            backend._lock.acquire()  # dies with the lock
            line = json.dumps(logs[0], separators=(",", ":"))
            with Path("search", JOURNAL).open("a") as file:
                file.write(line[: random.randrange(len(line))])
            os.kill(os.getpid(), signal.SIGKILL)
        real_append(backend, logs)

    os.fsync, JournalFileBackend.append_logs = fsync, append


def run(checked: search.Search, event: int) -> int:
    """A search in a process of its own, in the working directory; returns its exit status, negative if killed."""
    sys.stdout.flush()
    seed = random.getrandbits(32)  # before the fork: each process has other random numbers
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    try:
        with Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 1)
        random.seed(seed)
        kill_at(event)
        checked.run(Jobs())
        status = 0
    except RunFailedError:
        status = 1
    finally:
        os._exit(status)


def prepare(app: Hydra, sampler: str, pruner: str, n_jobs: int, trials: int) -> kills.RunSearch:
    words = [*SPACE, "name=search", f"hydra.sweeper.n_trials={trials}", f"hydra.sweeper.n_jobs={n_jobs}"]
    words += ["hydra/sweeper=optuna", "hydra.sweep.dir=search", f"trainer.max_epochs={EPOCHS}"]
    args = train.parse_arguments(["-m", *words, f"hydra.sweeper.sampler={sampler}", f"hydra.sweeper.pruner={pruner}"])
    config = train.compose(app, args, RunMode.MULTIRUN)
    config.hydra.overrides.hydra.append("sweep.keys=[]")
    config.hydra.sweeper.params = {}
    checked = search.Search(config, parse_overrides(list(config.hydra.overrides.task)), on_this_machine=True)

    def run_search(most: int, _: float) -> kills.Found:
        killed = 0  # as often as it happens, unless it is not to be
        while (status := run(checked, random.randint(1, 60) if most else 0)) == -signal.SIGKILL:
            killed += 1
        assert status == 0, status
        ended = Path("ended").read_text().split()
        return kills.describe(Path("search")), killed, len(ended) - len(set(ended))

    return run_search


if __name__ == "__main__":
    search.Search._finish = lambda self: None  # it tests the best trial's checkpoint
    search_checks.check_jobs = lambda jobs, *_: [compose_settings(jobs[0])]  # no data are prepared
    with open_hydra() as app:
        args = kills.build_parser(SCENARIOS, TRIALS).parse_args()
        kills.compare_all(SCENARIOS, args, functools.partial(prepare, app))
