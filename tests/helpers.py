"""What several test modules use: a small run's overrides, the program in a process of its own, and stand-ins."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nin.config.schema import Settings
from nin.runs.folder import RunFolder
from nin.training.request import RunRequest

# A whole run in a second or two: two epochs of six batches of the garments at 28x28.
SMALL = (
    "experiment=quickstart",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "data.batch_size=32",
    "trainer.log_every_n_steps=4",
    "model.widths=[8,16]",
    "model.last_width=16",
    "model.dropout=0.2",
)


def merge(overrides: Iterable[object]) -> list[str]:
    """Overrides with the last value of each key: a key with two values is refused."""
    words = [str(word) for word in overrides]
    keys = [word.partition("=")[0] for word in words]
    return [word for i, word in enumerate(words) if "=" not in word or keys[i] not in keys[i + 1 :]]


# Without cached bytecode every process would compile torch and Lightning again.
ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k not in ("NIN_DATA", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")
}


def nin(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program as a person would, warnings being errors."""
    return subprocess.run(
        [sys.executable, "-m", "nin", *merge(arguments)],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def broken_pipe() -> int:
    """A file descriptor to write to, of which nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


# What `start` has started in the test that is running: what a failed test leaves is ended after it.
STARTED: list[subprocess.Popen[str]] = []


def start(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts the program and returns while it runs."""
    command = [sys.executable, "-m", "nin", *merge(arguments)]
    process = subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    STARTED.append(process)
    return process


# For processes whose settings have `gated`.
GATED = {"PYTHONPATH": str(Path(__file__).parent)}


def gated(path: Path) -> list[str]:
    """Overrides with which training waits before the step whose number is in the file ``path``."""
    return ["+callbacks.gate._target_=gate.Gate", f"+callbacks.gate.path={path}"]


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 90) -> None:
    wait_until(path.exists, process, seconds)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    begun = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < begun + seconds, condition
        time.sleep(0.002)


def read_results(sweep: Path) -> dict[str, dict[str, Any]]:
    """The results of a sweep's or a search's jobs, by the names of their folders."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(sweep.glob("*/result.json"))}


def outcome(result: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What is the same for the same run, however often it was resumed: the final weights and the metrics."""
    return result["weights_sha256"], result["metrics"]


class FakeExperiment:
    """In the place of `Experiment`: trains nothing. Notes its epochs in the folder, as checkpoints do."""

    def __init__(self, request: RunRequest):
        self.request, self.settings, self.folder = request, request.settings, request.folder
        self.resume_checkpoint = {} if self.folder.checkpoints.exists() else None
        self.run_id = self.folder.read_state().get("run_id")

    def describe_start(self) -> str:
        return "nothing is trained"

    def train(self) -> None:
        """Replaced by tests."""

    def run(self, resumes: int = 0) -> dict[str, Any]:
        self.folder.checkpoints.mkdir(exist_ok=True)
        self.train()
        metrics = {f"{part}/{name}": 0.5 for part in ("val", "test") for name in ("acc", "loss")}
        return {
            "status": "finished", "metrics": metrics, "epochs": self.settings.trainer.max_epochs, "steps": 1,
            "train_seconds": 1.0, "images_per_second": 1.0, "parameters": 1, "weights_sha256": "0" * 64,
            "precision": "32-true", "processes": 1,
        }  # fmt: skip


def put_job(
    folder: Path, overrides: Sequence[str], acc: float | None = None, config: str = "", metrics: Any = (), **more: Any
) -> Path:
    """Writes a job's files as a run does.

    Args:
        acc: the accuracies of its result; without one, and without ``more``, it has no result.
        config: the content of ``.hydra/config.yaml``.
        metrics: replace those of the result.
        more: for ``result.json``.
    """
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if config:
        (folder / ".hydra" / "config.yaml").write_text(config)
    if acc is not None or more:
        known = {"val/acc": acc, "val/loss": 1.0, "test/acc": acc, "test/loss": 1.0, "test/acc_by_class": {}}
        result = {"status": "finished", "train_seconds": 2.0, "test_images": 10_000}
        (folder / "result.json").write_text(json.dumps(result | {"metrics": known | dict(metrics)} | more))
        rows = [f"{epoch},{epoch * 8.0},{(acc or 0) * epoch / 2},1.0" for epoch in (1, 2)]
        (folder / "metrics.csv").write_text("\n".join(["epoch,seconds,val/acc,val/loss", *rows, ""]))
    return folder


def run_experiment(
    settings: Settings, folder: RunFolder, overrides: Sequence[str] = (), callbacks: Sequence[Any] = ()
) -> dict[str, Any]:
    """Trains without the command line, in a folder that this process has to itself; returns the result.

    Args:
        callbacks: added to those of the run.
    """
    from nin.data.sources import prepare
    from nin.training.experiment import Experiment

    class ExtendedExperiment(Experiment):
        def _callbacks(self) -> list[Any]:
            return [*super()._callbacks(), *callbacks]

    prepare(settings.data)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    return ExtendedExperiment(RunRequest(settings, folder, list(overrides))).run()
