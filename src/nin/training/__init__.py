"""One run: the LightningModule, its Trainer and callbacks, from the settings to the result.

A module imports only from the modules below it:

    experiment             build, fit, test the best checkpoint, result
    trainer                the Trainer with its loggers and callbacks
    classifier, callbacks  the LightningModule; its callbacks
"""
