"""Network in Network on Fashion-MNIST, as a Lightning + Hydra experiment.

A file imports only from rows below its own:

    __main__, cli     dispatch; nothing heavy imported
    commands/         one file a command
    launch            a sweep's start: its jobs checked, their folders, threads and GPUs
    summary           one answer for all of a sweep's jobs: table, files, picture
    sweep             a sweep's jobs: their folders, what varies, what came out
    bench/            how fast, beside the notebooks' loop and the machine's limit
    report            results in words, for a terminal
    experiment        build, fit, test the best checkpoint
    trainer           Lightning's Trainer with its loggers and callbacks, precision and threads
    progress          what a person sees while it runs
    checkpoints       what is saved, when, under which name
    health            dead classes and channels, counted and told
    callbacks         what is watched and drawn while training
    stopping          Ctrl-C and SIGTERM
    checkpoint_files  whole or not there, with a checksum, data only
    classifier        the LightningModule: loss, metrics, optimiser
    data/             the DataModule; Fashion-MNIST's files; the garments; resizing
    networks/         plain torch: nin, lenet, alexnet, vgg; their table of layers
    allocator         freed memory is kept for the next step
    processes         one run in several of them, as torchrun and srun start them
    run_folder        names and atomic writes of a run's files
    config            Hydra's composition, and all mistakes in a command line at once
    checks            from a composed config to settings, or to all mistakes at once
    settings          the typed config; imports no torch
    models            that of the networks, and how small their images may be
"""
