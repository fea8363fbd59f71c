"""Training speed beside the notebooks' loop, the overhead of a training step, and its memory."""
