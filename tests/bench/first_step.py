"""Seconds to the first training step of ``nin train``, and of ``import lightning``, in turns.

    python tests/bench/first_step.py [turns]

The images of ``experiment=quickstart`` are generated before. Each process ends after its first batch.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning import Callback


class EndAfterFirstStep(Callback):
    """Ends the process, so that nothing after the first batch is measured."""

    def on_train_batch_end(self, *_: Any) -> None:
        os._exit(0)


def seconds(arguments: list[str], folder: Path) -> float:
    """How long a process of this Python takes."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main(turns: int) -> None:
    training = ["-m", "nin", "train", "experiment=quickstart", "threads=1"]
    with tempfile.TemporaryDirectory() as folder:
        measured = []
        for turn in range(turns + 1):  # the first one generates the images
            words = [*training, f"name={turn}", "+callbacks.end._target_=first_step.EndAfterFirstStep"]
            step, imported = seconds(words, Path(folder)), seconds(["-c", "import lightning"], Path(folder))
            measured += [(step, imported)] if turn else []
            print(f"first step {step:.2f} s, import lightning {imported:.2f} s, ratio {step / imported:.2f}")
    ratios = sorted(step / imported for step, imported in measured)
    print(f"ratio of {turns} turns: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
