"""The request for a run: one object that all its steps share."""

import shlex
from dataclasses import dataclass, field

from nin.config.keys import is_within, split_override
from nin.config.schema import Settings
from nin.config.trust import find_modules_of_trained, find_modules_to_allow
from nin.runs.console import format_path, format_repeated_command
from nin.runs.folder import RunFolder
from nin.system.processes import StopRequest, multi_process_launcher


@dataclass
class RunRequest:
    """The settings, the folder and the stop signals of one run.

    Args:
        settings: validated settings.
        folder: the run's folder; it need not exist.
        overrides: the overrides that led to ``settings``, for the result.
        options: what the command needs besides them to compose the same config, as ``--config-dir``.
        label: a prefix of the lines that the run prints, where several runs print at the same time.
        stop: receives the signals that stop the run.
        rank: of this process, where several train together.
        wait: whether to wait while another process works on this run, instead of raising RunClaimedError.
    """

    settings: Settings
    folder: RunFolder
    overrides: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    label: str = ""
    stop: StopRequest = field(default_factory=StopRequest)
    rank: int = 0
    wait: bool = False

    @property
    def command(self) -> str:
        """The command of this run, to be typed in a shell; for a sweep's job the command that runs it alone."""
        given: dict[str, str] = {}
        for word in self.overrides:
            key = split_override(word)[0]
            if key == "name" and self.settings.sweep.keys:
                continue  # the sweep's name
            is_added = given.get(key, "").startswith("+")  # by an earlier start, and changed when it was resumed
            if word.startswith("~"):  # with what was set within it
                given = {other: earlier for other, earlier in given.items() if not is_within(other, [key])}
                if is_added:
                    continue
            given[key] = f"+{word}" if is_added and not word.startswith("+") else word
        return shlex.join(["nin", "train", *self.options, *given.values()])

    @property
    def resume_command(self) -> str:
        """What resumes this run, after it was stopped."""
        modules = find_modules_to_allow(self.settings)
        if self.settings.sweep.keys or multi_process_launcher() or modules is None:
            return format_repeated_command(self.settings.name, self.overrides)
        return shlex.join(["nin", "resume", format_path(self.folder.path), *_allow(modules)])

    @property
    def eval_command(self) -> str:
        """What tests this run again, and prints its confusion matrix."""
        modules = find_modules_of_trained(self.settings)
        return shlex.join(["nin", "eval", format_path(self.folder.path), *_allow(modules)])


def _allow(modules: list[str]) -> list[str]:
    return [word for module in modules for word in ("--allow", module)]
