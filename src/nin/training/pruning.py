"""The pruner of a search, within one of its trials: it compares the trial with a fixed list of earlier trials.

The list is a file in the run's folder. A resumed run, and a trial that runs at the same time as others, therefore make
the same decisions as an undisturbed one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.trial import FrozenTrial, TrialState, create_trial

from nin.config.schema import UserError
from nin.runs.files import read_text, write_atomically

_RUNG = "completed_rung_"  # Optuna's successive halving stores the value at a rung under this key of a trial


def build_pruner(name: str, max_epochs: int | None) -> BasePruner:
    """Optuna's pruner ``name`` with its defaults. A step is an epoch.

    Args:
        max_epochs: of a trial that is not pruned; None if it is not known.
    """
    if name == "median":
        return MedianPruner()
    if name == "hyperband":
        return HyperbandPruner(max_resource=max_epochs or "auto")
    return NopPruner()


def comparison_path(run_folder: Path) -> Path:
    """The file in a trial's folder that has the earlier trials with which it is compared."""
    return run_folder / ".hydra" / "comparison.json"


def write_comparison(
    run_folder: Path, name: str, pruner: str, max_epochs: int | None, earlier: Sequence[FrozenTrial]
) -> None:
    """Writes what a trial is compared with.

    Args:
        name: of the study; Hyperband derives a trial's bracket from it.
        earlier: all trials of a lower number. The state of those that the trial must not see is RUNNING.
    """
    trials = [
        {
            "state": trial.state.name,
            "value": trial.value,
            "values": trial.intermediate_values,
            "rungs": {key: value for key, value in trial.system_attrs.items() if key.startswith(_RUNG)},
        }
        for trial in earlier
    ]
    content = {"name": name, "pruner": pruner, "max_epochs": max_epochs, "trials": trials}
    write_atomically(comparison_path(run_folder), json.dumps(content))


def without_values(trial: FrozenTrial) -> FrozenTrial:
    """``trial`` as it was when it was proposed: running, without any value."""
    return create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs={key: value for key, value in trial.system_attrs.items() if not key.startswith(_RUNG)},
    )


class TrialPruner:
    """Decides after each epoch whether a trial is pruned.

    Args:
        run_folder: of the trial; it must have the file that `write_comparison` writes.

    Raises:
        UserError: if the file can't be read.
    """

    def __init__(self, run_folder: Path):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = comparison_path(run_folder)
        try:
            content: dict[str, Any] = json.loads(read_text(path))
            study = optuna.create_study(
                study_name=content["name"],
                direction="maximize",
                sampler=optuna.samplers.RandomSampler(0),  # nothing is sampled
                pruner=build_pruner(content["pruner"], content["max_epochs"]),
            )
            for trial in content["trials"]:
                study.add_trial(
                    create_trial(
                        state=TrialState[trial["state"]],
                        value=trial["value"],
                        intermediate_values={int(step): value for step, value in trial["values"].items()},
                        system_attrs=trial["rungs"],
                    )
                )
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: can't be read; run the search's own command again, which writes it") from error
        self._study, self._trial = study, study.ask()
        self._reported: set[int] = set()
        self.is_pruned = False

    def report(self, values: Mapping[int, float], last_epoch: int | None = None) -> bool:
        """Reports the epochs that were not reported yet, in order, and returns whether the trial is pruned.

        After its ``last_epoch`` a trial is complete: pruning it would save nothing.
        """
        for epoch in sorted(set(values) - self._reported):
            self._reported.add(epoch)
            self._trial.report(values[epoch], epoch)
            is_worse = self._trial.should_prune()  # after the last epoch as well: it notes the value of a rung
            self.is_pruned = self.is_pruned or (is_worse and epoch != last_epoch)
        return self.is_pruned

    @property
    def rungs(self) -> dict[str, float]:
        """The values at the rungs of successive halving that the trial has reached, for later trials."""
        stored = self._study.get_trials(deepcopy=False)[-1].system_attrs
        return {key: value for key, value in stored.items() if key.startswith(_RUNG)}
