"""Faster imports of torch and Lightning. Imports neither."""

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For the first import of torch and Lightning: about a million objects, which stay until the process ends.

    The garbage collector would search them again and again, in a sixth of the time to the first step. Afterwards it
    leaves them out (``gc.freeze``).
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
