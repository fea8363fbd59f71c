"""One module per command. Each has ``main(arguments)``, which returns the exit status, or None for 0.

No command imports another; a module imports only from the modules below it:

    bench, eval, export, inspect, predict, report, resume, serve, train  arguments in, exit status out
    options                                                              what several commands have
"""
