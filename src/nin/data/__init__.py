"""Images: the LightningDataModule, the data sets, resizing and augmentation.

A module imports only from the modules below it:

    module                the LightningDataModule: data in memory, held-out images, batches
    sources               the files of a data set: download, checksums, classes and channels
    published             names and published checksums of these files
    own                   a LightningDataModule of the user's own
    garments, transforms  synthetic clothing silhouettes; augmentation and resizing of a batch
    overlays              images and score maps over them, for matplotlib
    cifar10, idx          CIFAR-10's archive, read as data; the IDX format of the MNIST family
    splits                a folder's images for training, validation and test
    cache                 the decoded images of a folder: written once, and memory-mapped
    parallel              decoding in parallel processes
    chunks                the files that one process decodes
    folder, decoding      the files of a folder, and what is wrong with them; decoding of one image
"""
