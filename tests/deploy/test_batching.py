"""Images of concurrent requests are scored together, and only so many wait."""

import asyncio
import threading

import numpy as np
import pytest

from nin.data.decoding import ImageTooLargeError
from nin.deploy import batching
from nin.deploy.batching import Batcher, OverloadedError
from nin.deploy.trained import Description, Scores, TrainedNetwork


def first_pixels(images: np.ndarray) -> Scores:
    """By its first pixel a test knows which image an answer is of."""
    values = images.reshape(len(images), -1)[:, :1].astype(np.float32)
    return Scores(values, values)


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
        return first_pixels(images)

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


@pytest.mark.parametrize(("limit", "value"), [("BATCH_IMAGES", 3), ("BATCH_PIXELS", 15)])
def test_a_batch_has_a_largest_size_and_no_image_that_nobody_waits_for(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, limit, value)  # 15 pixels hold three images of 2x2
    computed: list[list[int]] = []
    begun, go = threading.Event(), threading.Event()

    def compute(images: np.ndarray, maps: bool) -> Scores:
        computed.append(images[:, 0, 0].tolist())
        begun.set()
        assert go.wait(60)
        return first_pixels(images)

    async def play() -> None:
        batcher = Batcher(TrainedNetwork(Description(["a"], 1, 2, 2, False, "gap", {}), compute), 9, 1000)
        batcher.start()
        images = [np.full((2, 2), i, np.uint8) for i in range(9)]
        tasks = [asyncio.create_task(batcher.score(images[0], False))]
        assert await asyncio.to_thread(begun.wait, 60)
        tasks += [asyncio.create_task(batcher.score(image, False)) for image in images[1:]]
        await asyncio.sleep(0)  # they wait now
        tasks[5].cancel()  # as when its client has gone
        go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(batcher.close)

    asyncio.run(play())
    assert computed == [[0], [1, 2, 3], [4, 6, 7], [8]]


def test_a_request_that_has_timed_out_leaves_the_others_of_its_batch_answered() -> None:
    begun, go = threading.Semaphore(0), threading.Semaphore(0)

    def compute(images: np.ndarray, maps: bool) -> Scores:
        begun.release()
        assert go.acquire(timeout=60)
        return first_pixels(images)

    async def play() -> Scores:
        batcher = Batcher(TrainedNetwork(Description(["a"], 1, 2, 2, False, "gap", {}), compute), 8, 1000)
        batcher.start()
        images = [np.full((2, 2), i, np.uint8) for i in range(3)]
        first = asyncio.create_task(batcher.score(images[0], False))
        assert await asyncio.to_thread(begun.acquire, timeout=60)
        late, other = (asyncio.create_task(batcher.score(image, False)) for image in images[1:])
        await asyncio.sleep(0)  # they wait now, and are the next batch
        go.release()
        assert await asyncio.to_thread(begun.acquire, timeout=60)
        late.cancel()  # while its batch is computed
        go.release()
        await asyncio.gather(first, late, return_exceptions=True)
        scores = await asyncio.wait_for(other, 60)
        await asyncio.to_thread(batcher.close)
        return scores

    assert float(asyncio.run(play()).probabilities[0]) == 2


def test_the_images_of_a_batch_have_one_size_and_too_many_pixels_are_refused() -> None:
    shapes: list[tuple[int, ...]] = []
    begun, go = threading.Event(), threading.Event()

    def compute(images: np.ndarray, maps: bool) -> Scores:
        shapes.append(images.shape)
        begun.set()
        assert go.wait(60)
        return first_pixels(images)

    async def play() -> list[float]:
        batcher = Batcher(TrainedNetwork(Description(["a"], 1, 2, 2, False, "gap", {}), compute), 8, 30)
        batcher.start()
        images = [np.full((side, side), i, np.uint8) for i, side in enumerate((2, 3, 2, 3))]
        tasks = [asyncio.create_task(batcher.score(images[0], False))]
        assert await asyncio.to_thread(begun.wait, 60)
        tasks += [asyncio.create_task(batcher.score(image, False)) for image in images[1:]]
        await asyncio.sleep(0)  # they wait now: 26 pixels in all
        with pytest.raises(OverloadedError):
            await batcher.score(np.zeros((1, 5), np.uint8), False)
        go.set()
        scores = await asyncio.gather(*tasks)
        await asyncio.to_thread(batcher.close)
        return [float(one.probabilities[0]) for one in scores]

    assert asyncio.run(play()) == [0, 1, 2, 3]
    assert shapes == [(1, 2, 2), (2, 3, 3), (1, 2, 2)]
