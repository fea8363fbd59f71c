"""The experiment of ``nin train`` in plain PyTorch: the same weights, without Lightning, Hydra and `speed`.

    python3 -m uv run python docs/plain_loop.py FOLDER [image_size=224] [epochs=10] [seed=0] …

FOLDER holds the four unpacked IDX files. `docs/architecture.md` has the command of ``nin train`` that ends with the
same weights, to the bit on one machine with one number of threads; a test compares the two.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.datasets.mnist import read_image_file, read_label_file


def nin_block(in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int) -> nn.Sequential:
    """A convolution followed by two 1x1 convolutions, each with a ReLU (Lin et al. 2013, section 3.1)."""
    first = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
    second, third = (nn.Conv2d(out_channels, out_channels, 1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU())


def build_network() -> nn.Sequential:
    blocks = (nin_block(1, 96, 11, 4, 0), nin_block(96, 256, 5, 1, 2), nin_block(256, 384, 3, 1, 1))
    body = [layer for block in blocks for layer in (block, nn.MaxPool2d(3, stride=2))]
    # One map per class; the mean of the map is the logit.
    network = nn.Sequential(*body, nn.Dropout(), nin_block(384, 10, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
    return network


def prepare(images: Tensor, image_size: int) -> Tensor:
    """(batch, 28, 28) uint8 to (batch, 1, image_size, image_size) float32 from 0 to 1."""
    pixels = images.unsqueeze(1).float() / 255  # antialiased only where an image becomes smaller
    return functional.interpolate(pixels, size=(image_size, image_size), mode="bilinear", antialias=True)


def read(folder: str, part: str) -> tuple[Tensor, Tensor]:
    images, labels = (str(Path(folder) / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return read_image_file(images), read_label_file(labels)


def train(folder, image_size=224, batch_size=128, val_size=5000, epochs=10, lr=0.1, seed=0) -> nn.Sequential:
    images, labels = read(folder, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = order[val_size:].sort().values  # `nin train` holds the others out to choose the best checkpoint

    torch.manual_seed(seed)  # for the initial weights and the masks of dropout
    network = build_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    for epoch in range(epochs):
        # The order of an epoch depends on seed and epoch only: a resumed run finds it again.
        epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(epoch_seed))
        for batch in kept[order].split(batch_size):
            loss = functional.cross_entropy(network(prepare(images[batch], image_size)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}/{epochs}  loss of the last batch {loss.item():.4f}")
    return network


if __name__ == "__main__":
    folder, *words = sys.argv[1:] or sys.exit(__doc__)
    settings = {key: float(value) if key == "lr" else int(value) for key, value in (word.split("=") for word in words)}
    network = train(folder, **settings).eval()
    weights = b"".join(weight.numpy().tobytes() for weight in network.state_dict().values())
    print("weights", hashlib.sha256(weights).hexdigest())
    images, labels = read(folder, "t10k")
    size = int(settings.get("image_size", 224))
    with torch.no_grad():
        predicted = [network(prepare(some, size)).argmax(1) for some in images.split(128)]
    print(f"test/acc {(torch.cat(predicted) == labels).float().mean():.4f} (of the last weights)")
