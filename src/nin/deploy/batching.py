"""Scores the images of concurrent requests together, in a thread beside the event loop. Imports no torch."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nin.data.decoding import ImageTooLargeError
from nin.deploy.trained import Scores, TrainedNetwork

BATCH_IMAGES, BATCH_PIXELS = 64, 4_000_000


class OverloadedError(RuntimeError):
    """The image is refused, because as many as allowed wait already."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    image: np.ndarray
    maps: bool
    future: "asyncio.Future[Scores]"


class Batcher:
    """Collects images while a batch is computed; whatever waits then is the next batch, of images of one size.

    A single request does not wait for others, and under load batches become larger. One thread computes them:
    onnxruntime releases the interpreter meanwhile, and spreads a batch over the cores itself.

    Args:
        max_images, max_pixels: limits on all that waits.
        observe: called with the size of every batch, from the event loop.
    """

    def __init__(
        self,
        network: TrainedNetwork,
        max_images: int,
        max_pixels: int,
        observe: Callable[[int], None] = lambda size: None,
    ):
        self.network, self.max_images, self.max_pixels, self.observe = network, max_images, max_pixels, observe
        self.waiting: deque[_Waiting] = deque()
        self.images, self.pixels = 0, 0  # waiting, being decoded or being computed
        self.changed, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Starts the thread; called in the event loop that awaits `score`."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def close(self) -> None:
        """Ends the thread after all that waits."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    @contextlib.contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Counts an image that waits, for its turn here or to be decoded.

        Raises:
            OverloadedError: if an image of ``pixels`` pixels can't wait too.
        """
        if self.images >= self.max_images or (self.images and self.pixels + pixels > self.max_pixels):
            raise OverloadedError
        self.images, self.pixels = self.images + 1, self.pixels + pixels
        try:
            yield
        finally:
            self.images, self.pixels = self.images - 1, self.pixels - pixels

    async def score(self, image: np.ndarray, maps: bool) -> Scores:
        """Scores of one image, without the batch dimension: probabilities and logits ``(classes,)``.

        Args:
            image: uint8 ``(height, width)`` for 1 channel, ``(height, width, 3)`` for 3.
            maps: whether the score maps ``(classes, height', width')`` are computed.

        Raises:
            OverloadedError: if too many images wait.
        """
        with self.reserve(image.shape[0] * image.shape[1]):
            future = asyncio.get_running_loop().create_future()
            with self.changed:
                self.waiting.append(_Waiting(image, maps, future))
                self.changed.notify()
            return await future

    def _work(self) -> None:
        assert self.loop is not None
        while batch := self._next_batch():
            scores: list[Scores] | Exception
            try:
                scores = self._compute(batch)
            except MemoryError:
                scores = ImageTooLargeError("does not fit in memory")
            # Whatever is wrong with a batch is its requests' failure, not the thread's end.
            except Exception as error:  # noqa: BLE001
                scores = error
            self.loop.call_soon_threadsafe(self._answer, batch, scores)
            del batch, scores  # while this thread waits, large images must not

    def _next_batch(self) -> list[_Waiting]:
        """Waits for images; those of the first one's size that wait, or none at the end."""
        with self.changed:
            while not self.waiting and not self.closed:
                self.changed.wait()
            if not self.waiting:
                return []
            shape = self.waiting[0].image.shape
            most = max(1, min(BATCH_IMAGES, BATCH_PIXELS // (shape[0] * shape[1])))
            batch: list[_Waiting] = []
            others: list[_Waiting] = []
            while self.waiting and len(batch) < most:
                one = self.waiting.popleft()
                if one.future.cancelled():
                    continue
                (batch if one.image.shape == shape else others).append(one)
            self.waiting.extendleft(reversed(others))
        return batch or self._next_batch()

    def _compute(self, batch: list[_Waiting]) -> list[Scores]:
        maps = any(one.maps for one in batch)
        return self.network.compute(np.stack([one.image for one in batch]), maps).each()

    def _answer(self, batch: list[_Waiting], scores: list[Scores] | Exception) -> None:
        self.observe(len(batch))
        for i, one in enumerate(batch):
            if one.future.done():  # its request timed out
                continue
            if isinstance(scores, Exception):
                one.future.set_exception(scores)
            else:
                one.future.set_result(scores[i])
