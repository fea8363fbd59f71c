"""Checkpoint files, and the state that makes resuming exact.

A module imports only from the modules below it:

    files, loop_state, random_state  atomic, checksummed files; the counters of Lightning's loops; random generators
"""
