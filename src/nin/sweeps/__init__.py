"""Sweeps: their jobs, the processes that run them, their summary.

A module imports only from the modules below it:

    launch         starts a sweep; forwards signals to its workers
    checks         the jobs are checked before the first one starts
    workers        one job, in the sweep's process, in a worker or on a cluster
    gpus, summary  one job per GPU; the table, summary.csv, summary.md and summary.png
    chart          the picture of a sweep
    jobs           the jobs of a sweep and their folders
"""
