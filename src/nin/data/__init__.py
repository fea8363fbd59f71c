"""Images: the LightningDataModule, the data sets, resizing and augmentation.

A module imports only from the modules below it:

    module                the LightningDataModule: data in memory, held-out images, batches
    sources               the files of a data set: download, checksums, classes and channels
    garments, transforms  synthetic clothing silhouettes; augmentation and resizing of a batch
    pictures              images and score maps over them, for matplotlib
    splits                which images of a folder are for training, validation and test
    cache                 the decoded images of a folder: written once, in parallel, and memory-mapped
    folder, decoding      the files of a folder, and what is wrong with them; decoding of one image
"""
