"""The networks in plain PyTorch, each built from its name and its hyperparameters.

A module imports only from the modules below it:

    build                      builds a network by name, and initializes its weights
    <network>                  the networks, one file each: nin, lenet, alexnet, vgg, mlp
    layers, speed              table of layers; the same function, computed faster
    score_maps                 where in an image each class is recognized
    sequential                 the networks' base class; the layers of a sequence; a head of fully connected layers
    normalize, components      a first layer that normalizes the input; first filters from training images
"""
