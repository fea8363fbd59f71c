"""The typed config: what may be set, and how it is composed from ``conf/``.

A module imports only from the modules below it:

    trust                what a stored config must not do
    composition          Hydra's composition; every error of a command line in one message
    override_errors      Hydra's errors about one override
    hydra_options        Hydra's options on the command line, and those that a printed command needs
    validation           the composed config to `Settings`
    rules                the rules on several keys at once
    own_classes          classes of the user's own
    errors               messages about a config
    changes              which keys may change when a run is resumed
    schema               types and ranges of all keys
    networks             types and ranges of the keys of each network, from the signature of its class
    data_sets            types and ranges of the keys of each data set
    types, keys          base classes of sections, types with a range; dotted keys and overrides
"""
