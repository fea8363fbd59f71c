"""The operating system: signals, distributed processes, devices.

A module imports only from the modules below it:

    signals               Ctrl-C, SIGTERM, SIGUSR1
    distributed, devices  processes of one run; threads and memory of a device
"""
