"""Training speed compared with the notebooks' loop, the overhead of a training step, and its memory.

A module imports only from the modules below it:

    overhead, turns, memory  the cost of a step besides the network; rates measured in turns; memory of a step
    project, notebook        the training that is measured; the notebooks' loop
"""
