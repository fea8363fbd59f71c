"""One run: claim its folder, train or resume, test, write the result.

A module imports only from the modules below it:

    run                 from request to result: claims the folder, records the request and the result
    experiment          builds the module, the data and the Trainer; fits, tests the best checkpoint
    evaluation          the test of a network: at the end of a run, and of a checkpoint
    trainer             builds Lightning's Trainer, with the loggers and callbacks that the config names by _target_
    callbacks           what Lightning calls during training: metrics, TensorBoard, dead units, progress, checkpoints
    classifier, pruning  the LightningModule: training, validation and test steps, metrics; the pruner of a search
    optimizers          the optimizer, and the learning rate of every step
    initialization  weights of a checkpoint to start with; mean, deviation and first filters from training images
    loss                the loss of a batch: cross-entropy or one's own, in micro-batches, among processes, finite
    request             what is to be run, and where
"""
