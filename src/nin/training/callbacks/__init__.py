"""What happens during training besides the training step.

A module imports only from the modules below it:

    checkpoints, dead_units, progress, tensorboard  last.ckpt and best.ckpt; dead channels and classes; progress bar; TensorBoard
    metrics                                         metrics over windows of steps and over epochs
"""
