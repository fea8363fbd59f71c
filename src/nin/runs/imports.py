"""What the imports of torch and Lightning need. Imports neither."""

import atexit
import contextlib
import gc
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def lightning_imports() -> Iterator[None]:
    """Turns the garbage collector off while torch and Lightning are imported, then calls `route_lightning_logs`.

    The imports create about a million objects that live until the process ends; scanning them again and again takes a
    sixth of the time to the first step. ``gc.freeze`` then excludes them from later collections.
    """
    if "lightning" in sys.modules or not gc.isenabled():  # later there may be garbage, which must not be kept
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # bindings in C++ report what is not collected at the end
        route_lightning_logs()


def route_lightning_logs() -> None:
    """Sends Lightning's log records to the root logger alone: its import adds a handler, which would print them too."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
