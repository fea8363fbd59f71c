from pathlib import Path

from nin.bench.memory import measure_memory
from nin.config.composition import compose_settings


def test_weights_saved_by_a_linear_layer_are_not_counted_as_activations(data_root: Path) -> None:
    overrides = ["data=garments", f"data.root={data_root}", "trainer=cpu", "trainer.limit_val_batches=0", "threads=1"]
    overrides += ["model=lenet", "optimizer.lr=0.01", "speed.micro_batch=1"]
    measured = measure_memory(compose_settings(overrides), 2, lambda *_: None)
    assert measured["weights"] > 4 * 400 * 120
    for images, name in ((1, "activations"), (2, "activations_full_batch")):
        # At least the input and the output of each convolution.
        assert measured[name] > images * 4 * (784 + 6 * 784 + 6 * 196 + 16 * 100)
        most = 784 + 6 * 784 * 3 + 16 * 100 * 3 + 400 + 120 * 2 + 84 * 2 + 10 * 2
        assert measured[name] < images * 4 * most
