"""Images: where the files come from, how a batch is taken, augmented, resized and scaled."""
