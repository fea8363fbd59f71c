"""Images of concurrent requests are scored together, and only so many wait."""

import asyncio
import threading

import numpy as np

from nin.data.decoding import ImageTooLargeError
from nin.deploy.batching import Batcher, OverloadedError
from nin.deploy.trained import Description, Scores, TrainedNetwork


def test_an_overloaded_batcher_refuses_and_recovers() -> None:
    sizes: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def compute(images: np.ndarray, maps: bool) -> Scores:
        begun.set()
        go.wait(60)
        if images.max() == 255:
            raise ValueError("a bad batch")
        if images.max() == 254:
            raise MemoryError
        values = images.reshape(len(images), -1)[:, :1].astype(np.float32)
        return Scores(values, values)

    known = Description(["a"], 1, 2, 2, False, "gap", {})

    async def play() -> list[object]:
        batcher = Batcher(TrainedNetwork(known, compute), 8, 1000, sizes.append)
        batcher.start()
        images = [np.full((2, 2), i, np.uint8) for i in range(10)]
        scores = [asyncio.create_task(batcher.score(images[0], False))]
        await asyncio.to_thread(begun.wait, 60)
        scores += [asyncio.create_task(batcher.score(i, False)) for i in images[1:]]
        refused = await asyncio.gather(*scores[8:], return_exceptions=True)  # while the first is computed
        go.set()
        found = [*await asyncio.gather(*scores[:8]), *refused]
        bad = [np.full((2, 2), value, np.uint8) for value in (255, 254)]
        failed = [(await asyncio.gather(batcher.score(i, False), return_exceptions=True))[0] for i in bad]
        one = await batcher.score(images[3], False)
        await asyncio.to_thread(batcher.close)
        assert (batcher.images, batcher.pixels) == (0, 0)
        return [*found, *failed, one]

    found = asyncio.run(play())
    assert [float(s.probabilities[0]) for s in found[:8]] == list(range(8))  # type: ignore[attr-defined]
    assert all(isinstance(error, OverloadedError) for error in found[8:10])
    assert isinstance(found[10], ValueError)
    assert isinstance(found[11], ImageTooLargeError)  # answered with 413
    assert float(found[12].probabilities[0]) == 3  # type: ignore[attr-defined]
    assert sizes == [1, 7, 1, 1, 1]  # the seven that waited while the first was computed are scored together
