"""Ends a trial of a search early if its pruner decides so."""

from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from nin.training.callbacks.loops import is_stopping
from nin.training.callbacks.metrics import MetricsLogger
from nin.training.classifier import Classifier
from nin.training.pruning import TrialPruner


class PruningCallback(Callback):
    """Reports val/acc of every epoch to the search's pruner; a pruned run ends after that epoch.

    Args:
        run_folder: of the trial.
        metrics: the callback that has the metrics of all epochs, also of those before the run was resumed.
    """

    def __init__(self, run_folder: Path, metrics: MetricsLogger):
        self.pruner, self.metrics = TrialPruner(run_folder), metrics
        self.is_pruned = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        # All epochs each time: to the pruner of a resumed run none of them is reported yet.
        values = {row["epoch"]: row["val/acc"] for row in self.metrics.rows if "val/acc" in row}
        last_epoch = trainer.current_epoch + 1 if is_stopping(trainer) else trainer.max_epochs
        if self.pruner.report(values, last_epoch):
            self.is_pruned = trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"is_pruned": self.is_pruned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.is_pruned = state_dict["is_pruned"]
