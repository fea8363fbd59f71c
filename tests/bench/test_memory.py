from pathlib import Path

from nin.bench.memory import measure_memory
from nin.config.composition import compose_settings


def test_weights_saved_by_a_linear_layer_are_not_counted_as_activations(data_root: Path) -> None:
    overrides = ["data=garments", f"data.root={data_root}", "trainer=cpu", "trainer.limit_val_batches=0", "threads=1"]
    measured = measure_memory(compose_settings([*overrides, "model=lenet", "optimizer.lr=0.01"]), 2, print)
    assert measured["weights"] > 4 * 400 * 120
    # At least the input and the output of each convolution.
    assert measured["activations"] > 2 * 4 * (784 + 6 * 784 + 6 * 196 + 16 * 100)
    assert measured["activations"] < 2 * 4 * (784 + 6 * 784 * 3 + 16 * 100 * 3 + 400 + 120 * 2 + 84 * 2 + 10 * 2)
