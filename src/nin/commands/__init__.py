"""One module per command. Each has ``main(arguments)``, which returns the exit status, or None for 0.

No command imports another:

    bench, eval, export, inspect, predict, report, resume, serve, train  arguments in, exit status out
"""
