"""The typed config: what may be set, and how it is composed from ``conf/``.

A module imports only from the modules below it:

    composition  Hydra's composition; every error of a command line in one message
    validation   the composed config to `Settings`; combinations that can't work
    schema       types and ranges of all keys
    networks     types and ranges of the keys of each network
"""
