"""The state of Lightning's loops in a checkpoint, rewritten so that it is resumed from the right place."""

from enum import Enum
from typing import Any


class SavePoint(Enum):
    """The places in the training loop where a checkpoint is saved, and training resumes."""

    MID_EPOCH = "after an optimizer step, before the next batch"
    BEFORE_VALIDATION = "after the last training batch before a validation, which starts again on resuming"
    EPOCH_END = "after an epoch with its validation"


def rewrite_loop_state(fit_loop: dict[str, Any], save_point: SavePoint) -> None:
    """Sets the progress counters of Lightning's fit loop so that training resumes exactly after ``save_point``.

    Lightning's loops have four counters each (ready, started, processed, completed), which are incremented at
    different moments around a batch, a validation and an epoch. When a checkpoint is loaded, Lightning guesses from
    them in which hook it was saved. The guess is right for the hooks in which ``ModelCheckpoint`` saves. For others,
    Lightning repeats or skips the end of an epoch or a validation. For each save point, the counters set here are the
    combination from which Lightning 2.6 resumes at that place.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``, changed in place.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    for scope in ("total", "current"):
        epoch, batch = epochs[scope], batches[scope]
        match save_point:
            case SavePoint.EPOCH_END:
                epochs[scope] = dict.fromkeys(epoch, epoch["processed"])
                batches[scope] = dict.fromkeys(batch, batch["ready"] if scope == "total" else 0)
                validation[scope] = dict.fromkeys(validation[scope], 0)
            case SavePoint.BEFORE_VALIDATION:
                batches[scope] = dict.fromkeys(batch, batch["ready"])
                # The counters of a run that is killed in the first batch of the validation: Lightning starts it again.
                validation[scope] = dict.fromkeys(validation[scope], 0) | {"ready": 1, "started": 1}
            case SavePoint.MID_EPOCH:
                # Lightning increments "completed" after the hook in which this is saved, and accounts for that.
                batches[scope] = dict.fromkeys(batch, batch["ready"]) | {"completed": batch["ready"] - 1}
                validation[scope] = dict.fromkeys(validation[scope], 0)
    batches["is_last_batch"] = save_point is SavePoint.BEFORE_VALIDATION and batches["is_last_batch"]
    validation["is_last_batch"] = False
