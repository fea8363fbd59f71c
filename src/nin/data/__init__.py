"""Images: where the files come from, how a batch is taken, augment, resize and scaled."""
