"""The folder of a run: its files, its lock, and what a run prints and logs.

A module imports only from the modules below it:

    results          the result as a table
    folder, console  names of the files, and lock; terminal and nin.log
    files, versions  reading of files that may come from elsewhere, atomic writes; versions of the code
"""
