"""Sweeps: their jobs, the processes that run them, their summary.

A module imports only from the modules below it:

    launch         starts a sweep: checks its jobs, runs them by a launcher
    search         a sweep whose jobs Optuna proposes
    search_checks  what a search needs is checked before it starts
    checks         the jobs are checked before the first one starts
    signals        forwards signals to the workers of joblib
    workers        one job, in the sweep's process, in a worker or on a cluster
    gpus, summary  one job per GPU; the table, summary.csv, summary.md, summary.png and runs.csv
    search_report  the answer of a search
    search_best    its best configuration: as a command, as a file, and its test
    study          what is proposed for a trial of a search, and where trials are stored
    claims, space  which process works on which trial; Hydra's syntax for spaces as Optuna's distributions
    chart, tables  the picture of a sweep or a search; a table that fits the terminal
    jobs           the jobs of a sweep and their folders
    rows           the rows of its table: jobs that differ only in their seed
    stored         what the files in these folders say
"""
