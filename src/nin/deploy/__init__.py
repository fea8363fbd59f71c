"""From a checkpoint to use: predict, score maps, export, serve."""
