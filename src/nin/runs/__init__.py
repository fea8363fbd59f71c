"""The folder of a run: its files, its lock, and what a run prints and logs.

A module imports only from the modules below it:

    results, undo    the result as a table; a refused start leaves the folder as it was
    folder, console  names of the files, and lock; terminal and nin.log
    imports          what the imports of torch and Lightning need
    files, versions  reading of files that may come from elsewhere, atomic writes; versions of the code
"""
