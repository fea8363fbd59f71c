"""The request for a run: one object that all its steps share."""

from dataclasses import dataclass, field

from nin.config.schema import Settings
from nin.runs.folder import RunFolder
from nin.system.processes import StopRequest


@dataclass
class RunRequest:
    """The settings, the folder and the stop signals of one run.

    Args:
        settings: validated settings.
        folder: the run's folder; it need not exist.
        overrides: the overrides that led to ``settings``, for the result.
        label: a prefix of the lines that the run prints, where several runs print at the same time.
        stop: receives the signals that stop the run.
        rank: of this process, where several train together.
        wait: whether to wait while another process works on this run, instead of raising RunClaimedError.
    """

    settings: Settings
    folder: RunFolder
    overrides: list[str] = field(default_factory=list)
    label: str = ""
    stop: StopRequest = field(default_factory=StopRequest)
    rank: int = 0
    wait: bool = False
