"""The folder of a run: its files, its lock, and what is printed at the end.

A module imports only from the modules below it:

    results  the result as a table
    folder   names of the files, lock, log
"""
