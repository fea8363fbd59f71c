"""Data sets, batches, resizing and augmentation."""
