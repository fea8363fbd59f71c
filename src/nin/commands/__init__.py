"""One file a command. Each has ``main(arguments)``, which returns the exit status or None for 0."""
