"""Faster imports of torch and Lightning. Imports neither."""

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turns the garbage collector off while torch and Lightning are imported.

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
