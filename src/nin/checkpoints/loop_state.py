"""The counters of Lightning's loops in a checkpoint."""

from typing import Any


def rewrite_loop_state(fit_loop: dict[str, Any], place: str) -> None:
    """Sets the counters of Lightning's loops so that it goes on right behind ``place``.

    Lightning guesses from its counters in which hook a checkpoint was saved, and repeats or leaves out epochs' ends
    and validations where it guesses wrong. Here each place has the one form that it takes rightly.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    for part in ("total", "current"):
        epoch, batch = epochs[part], batches[part]
        if place == "epoch end":
            done = epoch["processed"]
            epochs[part] = dict.fromkeys(epoch, done)
            batches[part] = dict.fromkeys(batch, batch["ready"] if part == "total" else 0)
            validation[part] = dict.fromkeys(validation[part], 0)
        elif place == "before validation":
            batches[part] = dict.fromkeys(batch, batch["ready"])
            # As if killed within its first batch: Lightning goes back and begins the validation anew.
            validation[part] = dict.fromkeys(validation[part], 0) | {"ready": 1, "started": 1}
        else:
            # Lightning counts a batch as completed only after the hook in which this is saved, and knows that.
            batches[part] = dict.fromkeys(batch, batch["ready"]) | {"completed": batch["ready"] - 1}
            validation[part] = dict.fromkeys(validation[part], 0)
    batches["is_last_batch"] = place == "before validation" and batches["is_last_batch"]
    validation["is_last_batch"] = False
