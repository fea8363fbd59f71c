"""The answer of a search: its best trial, what mattered, and how the best does on test images."""

import contextlib
import csv
import io
import shlex
import shutil
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from optuna.trial import FrozenTrial, TrialState

from nin.config.errors import printable, printable_lines
from nin.config.schema import UserError
from nin.runs.console import Console, format_path, markdown_table, tensorboard_command
from nin.runs.files import write_atomically
from nin.runs.folder import RunFolder
from nin.sweeps.chart import draw_study
from nin.sweeps.claims import database_name
from nin.sweeps.search_best import (
    SearchFile,
    best_command,
    best_config,
    fits_config_file,
    read_search_file,
    read_test,
)
from nin.sweeps.study import JOURNAL, open_database, open_journal, trial_name
from nin.sweeps.tables import fit_table

_MAX_ROWS = 10
_OPTIMISM = (
    "The search's own figure is optimistic: it is the highest of many on the same held-out images, which chose it."
)


def best_trial(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The completed trial with the highest val/acc, among equal ones the first; None if none completed."""
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return max(completed, key=lambda trial: (trial.value, -trial.number), default=None)


def count_saved_epochs(trials: Sequence[FrozenTrial], max_epochs: int) -> int:
    """The number of epochs that pruned trials were not trained for."""
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    return sum(max(0, max_epochs - _last_epoch(trial)) for trial in pruned)


def _last_epoch(trial: FrozenTrial) -> int:
    """The number of the last epoch that ended with a validation."""
    return max(trial.intermediate_values, default=0)


def report_search(folder: Path, url: str | None = None) -> None:
    """Prints the answer of the search in ``folder`` and writes its summary and ``best.yaml``.

    Args:
        url: of its database, if it has one, as the command line gives it. The folder may come from elsewhere: what it
            names is not connected to.

    Raises:
        UserError: if the storage can't be read, or its ``url`` is missing.
    """
    search = read_search_file(folder)
    study = _load_study(folder, search, url)
    trials = study.get_trials(deepcopy=False)
    title = f"{printable(search.name)}: {_count(trials, search.n_trials)}; best val/acc first"
    console = Console()
    console.print(title, style="italic", soft_wrap=True)
    rows = _tabulate(trials)
    _print_table(console, _round_accuracies(rows[: _MAX_ROWS + 1]))
    if len(rows) > _MAX_ROWS + 1:
        print(f"the other {len(rows) - 1 - _MAX_ROWS} trials are in summary.csv")
    for trial in trials:
        if trial.state == TrialState.FAIL:
            reason = printable_lines(str(trial.user_attrs.get("error", "unknown error")))
            print(f"failed: {trial_name(trial.number)}: {reason}")
    notes = [printable(note) for note in describe_answer(folder, search, study)]
    for note in notes:
        console.print(note, soft_wrap=True)
    try:
        written = _write(folder, search, title, rows, notes, study)
    except OSError as error:
        print(f"no summary: {error.filename or folder} can't be written ({error.strerror})", file=sys.stderr)
    else:
        print(f"summary:    {format_path(folder)}/{written}")
    print(f"dashboards: {tensorboard_command(folder)}")
    if not url:
        package = "" if shutil.which("optuna-dashboard") else "    (of the package optuna-dashboard)"
        print(f"            {shlex.join(['optuna-dashboard', f'{format_path(folder)}/{JOURNAL}'])}{package}")


def _load_study(folder: Path, search: SearchFile, url: str | None) -> optuna.Study:
    """The study with its trials, in memory. Raises UserError if its storage can't be read, or ``url`` is missing."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not url and (named := search.storage):
        raise UserError(
            f"{folder}: its trials are in the database {database_name(named)}; a file does not decide where nin "
            f"connects to: add --storage postgresql://user@{database_name(named)}"
        )
    journal = folder / JOURNAL
    if not url and not journal.exists():
        raise UserError(f"{journal}: missing; the search's own command, run again, makes it from the trials' folders")
    storage = open_database(url) if url else open_journal(journal)
    try:
        stored = optuna.load_study(study_name=search.name, storage=storage)
    except KeyError:
        raise UserError(f"{folder}: its storage has no study {search.name}") from None
    study = optuna.create_study(study_name=stored.study_name, direction="maximize")
    try:
        study.add_trials(stored.get_trials(deepcopy=False))
    except ValueError as error:
        raise UserError(f"{folder}: its study can't be read ({error}); run the search under another name=…") from error
    return study


def _count(trials: Sequence[FrozenTrial], total: int) -> str:
    """Describes how many trials there are, as in "38 of 40 trials, 5 pruned, 1 failed"."""
    states = [trial.state for trial in trials]
    text = f"{sum(state.is_finished() for state in states)} of {max(total, len(trials))} trials"
    for state, name in ((TrialState.PRUNED, "pruned"), (TrialState.FAIL, "failed")):
        text += f", {states.count(state)} {name}" if state in states else ""
    return text


def _tabulate(trials: Sequence[FrozenTrial]) -> list[list[str]]:
    """The table as text, header first: completed trials, the best first, then the others by their numbers."""
    names = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed", TrialState.RUNNING: "unfinished"}
    keys = list(trials[0].params) if trials else []
    rows = [["trial", "val/acc", "epochs", "status", *map(printable, keys)]]
    for trial in sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, -(t.value or 0), t.number)):
        value = "" if trial.value is None else str(trial.value)
        state = names.get(trial.state, trial.state.name.lower())
        params = [printable(str(trial.params.get(key, ""))) for key in keys]  # in any order, in older searches
        rows.append([str(trial.number), value, str(_last_epoch(trial)), state, *params])
    return rows


def _round_accuracies(rows: list[list[str]]) -> list[list[str]]:
    """The table with four decimals of val/acc. summary.csv has all digits, which more trials differ in."""
    return [rows[0], *([number, acc and f"{float(acc):.4f}", *rest] for number, acc, *rest in rows[1:])]


def _print_table(console: Console, rows: list[list[str]]) -> None:
    """A column for each searched key if the terminal is wide enough, otherwise one for all of them."""
    header, *lines = [[_three_digits(cell) if i > 3 else cell for i, cell in enumerate(row)] for row in rows]
    # Keys without their sections, where that is unique.
    last = [key.rpartition(".")[2] for key in header]
    header = [name if last.count(name) == 1 else key for key, name in zip(header, last, strict=True)]
    pairs = [" ".join(f"{k}={v}" for k, v in zip(header[4:], line[4:], strict=False) if v) for line in lines]
    merged = [[*header[:4], "values"], *([*line[:4], pair] for line, pair in zip(lines, pairs, strict=True))]
    console.print(fit_table([([header, *lines], range(4, len(header))), (merged, {4})], console))


def _three_digits(cell: str) -> str:
    try:
        return f"{float(cell):.3g}" if len(cell) > 5 else cell
    except ValueError:
        return cell


def describe_answer(folder: Path, search: SearchFile, study: optuna.Study) -> list[str]:
    """The lines of the answer: the best trial and its command, its test, what mattered, what pruning saved."""
    trials = study.get_trials(deepcopy=False)
    best = best_trial(trials)
    if best is None:
        return ["no trial has completed yet"]
    notes = [f"best: {trial_name(best.number)}, val/acc {best.value:.4f}", f"    {best_command(search, best)}"]
    if fits_config_file(search):
        same = shlex.join(["nin", "train", "--config-dir", format_path(folder), "--config-name", "best"])
        notes.append(f"    {same}    (the same)")
    notes += _describe_test(folder, best, search.final_seeds)
    if importances := _importances(study):
        shown = ", ".join(f"{key} {share:.2f}" for key, share in importances.items())
        notes.append(f"importance for val/acc (fANOVA): {shown}")
    if search.max_epochs and any(trial.state == TrialState.PRUNED for trial in trials):
        saved = count_saved_epochs(trials, search.max_epochs)
        notes.append(f"pruning saved {saved} of {len(trials) * search.max_epochs} epochs")
    return notes


def _describe_test(folder: Path, best: FrozenTrial, seeds: list[int] | None) -> list[str]:
    finals, failed = [], []
    for seed in seeds or []:
        path = folder / f"final-{best.number:04d}-seed={seed}"
        result = RunFolder(path).find_result()
        if result.get("status") == "finished" and isinstance(acc := result.get("metrics", {}).get("test/acc"), float):
            finals.append(acc)
        elif result.get("status") == "failed":
            lines = str(result.get("error", "")).splitlines() or ["unknown error"]
            failed.append(f"failed: {path.name}: {lines[0]}")
    if finals:
        std = f" ± {statistics.stdev(finals):.4f}" if len(finals) > 1 else ""
        count = f"{len(finals)} seeds" if len(finals) > 1 else "one seed"
        text = f"trained again with {count}: test/acc {statistics.fmean(finals):.4f}{std}, worst {min(finals):.4f}"
        return [f"{text}; the search's figure: {best.value:.4f}", _OPTIMISM, *failed]
    with contextlib.suppress(ValueError, TypeError, KeyError):
        if tested := read_test(folder, best):
            acc = tested["metrics"]["test/acc"]
            return [f"tested once: test/acc {acc:.4f}; the search's figure: {best.value:.4f}", _OPTIMISM, *failed]
    return failed


def _importances(study: optuna.Study) -> dict[str, float]:
    """The importance of each key by fANOVA; empty if there are too few trials."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings(action="ignore"), contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError):
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {}


def _write(
    folder: Path,
    search: SearchFile,
    title: str,
    rows: list[list[str]],
    notes: list[str],
    study: optuna.Study,
) -> str:
    """Writes the summary; returns the names of its files."""
    best = best_trial(study.get_trials(deepcopy=False))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(folder / "summary.csv", text.getvalue())
    answer = [line for note in notes for line in ("", note)]
    picture = ["![](summary.png)", ""] if best else []
    header, *lines = _round_accuracies(rows)
    content = [f"# {title}", *answer, "", *markdown_table(header, lines), "", *picture]
    write_atomically(folder / "summary.md", "\n".join(content))
    written = "summary.csv, summary.md"
    config = None
    if best:
        draw_study(study, folder / "summary.png")
        written += ", summary.png"
        if fits_config_file(search):
            # The folder may come from elsewhere, and its words may be no overrides.
            with contextlib.suppress(HydraException, OmegaConfBaseException):
                config = best_config(search, best)
    if config:
        write_atomically(folder / "best.yaml", config)
        written += ", best.yaml"
    else:
        (folder / "best.yaml").unlink(missing_ok=True)  # written by an earlier state of the search
    return written
