"""One module per command. Each has ``main(arguments)``, which returns the exit status, or None for 0.

No command imports another:

    bench, eval, inspect, report, resume, train  arguments in, exit status out
"""
