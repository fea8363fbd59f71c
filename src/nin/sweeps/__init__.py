"""Sweeps: their jobs, the processes that run them, their summary.

A module imports only from the modules below it:

    launch, summary  starting a sweep and its workers; summary.csv, summary.md, summary.png
    jobs             the jobs of a sweep and their folders
"""
