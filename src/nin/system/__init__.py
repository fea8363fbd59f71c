"""The operating system: processes and their signals, devices.

A module imports only from the modules below it:

    processes, devices  ranks and signals of the processes of one run; threads and memory of a device
"""
