"""The typed config: what may be set, and how it is composed from ``conf/``.

A module imports only from the modules below it:

    trust        what a stored config must not do
    composition  Hydra's composition; every error of a command line in one message
    validation   the composed config to `Settings`; rules on several keys
    own          classes of the user's own
    errors       messages about a config
    schema       types and ranges of all keys
    networks     types and ranges of the keys of each network
"""
