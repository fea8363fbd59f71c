"""The request for a run: one object that all its steps share."""

import shlex
from dataclasses import dataclass, field

from nin.config.keys import flatten, split_override
from nin.config.schema import Settings, UserError
from nin.config.trust import require_trusted_targets
from nin.runs.console import format_name_override, format_path
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
            if is_added and word.startswith("~"):
                del given[key]
            else:
                given[key] = f"+{word}" if is_added and not word.startswith("+") else word
        return shlex.join(["nin", "train", *self.options, *given.values()])

    @property
    def resume_command(self) -> str:
        """What resumes this run, after it was stopped."""
        modules = _find_modules_to_allow(self.settings)
        if self.settings.sweep.keys or multi_process_launcher() or modules is None:
            # Without a name=… the same command would start another run or sweep, whose name is the time.
            return f"the same command and {shlex.quote(format_name_override(self.settings.name))}"
        allow = [word for module in modules for word in ("--allow", module)]
        return shlex.join(["nin", "resume", format_path(self.folder.path), *allow])


def _find_modules_to_allow(settings: Settings) -> list[str] | None:
    """The modules that nin resume must be allowed to import; None if it would refuse the settings all the same."""

    def is_accepted(allowed: list[str]) -> bool:
        try:
            require_trusted_targets(settings, allowed)
        except UserError:
            return False
        return True

    targets = [str(target) for key, target in flatten(settings.model_dump()).items() if key.endswith("._target_")]
    modules = list(dict.fromkeys(target.partition(".")[0] for target in targets))
    for module in list(modules):
        if is_accepted(others := [other for other in modules if other != module]):
            modules = others
    return modules if is_accepted(modules) else None
