"""What happens during training besides the training step.

A module imports only from the modules below it:

    checkpoints, dead_units, progress, pruning, tensorboard  what is saved; dead channels; bar; early end; images
    figures, training_control, mistakes                      drawings; the end at max_steps, schedules of val/loss;
                                                             a test's wrongly classified images
    metrics                                                  metrics over windows of steps and over epochs
    loops                                                    private attributes of Lightning's training loop
"""
