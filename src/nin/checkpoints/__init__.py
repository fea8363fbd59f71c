"""Checkpoint files, and the state that makes resuming exact.

A module imports only from the modules below it:

    checkpoint_io             how Lightning writes, removes and loads them
    files, weights            which of them are valid; whether the weights in them are those of a network
    checksum                  the checksum that a file ends with
    loop_state, random_state  the counters of Lightning's loops; random generators
"""
