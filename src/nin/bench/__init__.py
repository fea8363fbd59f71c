"""Images per second of training, beside the notebooks' loop and the limit of the machine.

A module imports only from the modules below it:

    overhead, turns, memory  the cost of a step besides the network; rates measured in turns; memory of a step
    project                  the training step that is measured
"""
