"""The HTTP service of a trained network: routes, limits, metrics. Imports no torch."""

import asyncio
import contextlib
import hmac
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from nin.data.decoding import ImageError, ImageTooLargeError, open_image
from nin.deploy.batching import Batcher, OverloadedError
from nin.deploy.images import ImageForm
from nin.deploy.requests import Parameters, RefusedError, overloaded, read_file, read_parameters
from nin.deploy.trained import Scores, TrainedNetwork

PAGES = Path(__file__).parent / "pages"
# An image of at most so many pixels and bytes is decoded at once: handing it to a thread would take longer. Both count:
# a few pixels can be decoded many times, and many bytes can hold many empty chunks.
SMALL_PIXELS, SMALL_IMAGE_BYTES = 10_000, 20_000
# Below this many bytes a body is read even where large ones fill the memory.
SMALL_BYTES = 500_000


@dataclass(frozen=True)
class Limits:
    """The limits of what clients may use.

    Attributes:
        body_bytes: of a request's body; 413 above.
        pixels: of one image; 413 above.
        waiting_images: of all images that wait to be decoded or scored; 503 above.
        seconds: until a request's body has arrived, 408 after; from then until its image is scored, 503 after.
    """

    body_bytes: int
    pixels: int
    waiting_images: int
    seconds: float

    @property
    def all_body_bytes(self) -> int:
        """The bytes of all bodies that arrive or wait to be decoded; above, only small ones are taken (503)."""
        return 16 * self.body_bytes

    @property
    def waiting_pixels(self) -> int:
        """The pixels of all images that wait to be scored; above, the answer is 503."""
        return 4 * self.pixels


class Service:
    """Answers requests for one network.

    Args:
        key: what ``Authorization: Bearer …`` or ``X-API-Key`` must hold for predictions and metrics; None: nothing.
    """

    def __init__(self, network: TrainedNetwork, limits: Limits, key: str | None):
        self.network, self.limits, self.key = network, limits, key
        self.is_stopping: Callable[[], bool] = lambda: False
        self.body_bytes = 0  # the bytes of all bodies that arrive or wait to be decoded
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("nin_requests", "Requests for predictions.", ["status"], registry=self.registry)
        self.seconds = Histogram(
            "nin_request_seconds",
            "Time of a request for a prediction, its upload included.",
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            registry=self.registry,
        )
        batch_sizes = Histogram(
            "nin_batch_images", "Images of a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.batcher = Batcher(network, limits.waiting_images, limits.waiting_pixels, batch_sizes.observe)
        waiting = Gauge("nin_waiting_images", "Images that wait, are decoded or computed.", registry=self.registry)
        waiting.set_function(lambda: self.batcher.images)
        # One at a time: each large image takes hundreds of megabytes while it is decoded.
        self.decoder = ThreadPoolExecutor(1)

    def app(self) -> Starlette:
        """The ASGI application."""
        app = Starlette(
            routes=[
                Route("/predict", self.predict, methods=["POST"]),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.metrics),
                Route("/info", self.info),
                Route("/openapi.json", lambda _: _page("openapi.json", "application/json")),
                Route("/docs", lambda _: _page("docs.html", "text/html; charset=utf-8")),
                Route("/", lambda _: _page("index.html", "text/html; charset=utf-8")),
            ],
            exception_handlers={HTTPException: _http_error},  # type: ignore[dict-item]
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False  # a wrong path is a 404, also /predict/
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.batcher.start()
        yield
        self.batcher.close()
        self.decoder.shutdown()

    async def predict(self, request: Request) -> Response:
        """POST /predict: the class and all probabilities of the image in the body, or of a form's one file."""
        begun = time.perf_counter()
        try:
            response = await self._predict(request)
        except RefusedError as refused:
            response = await _http_error(request, refused)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        except Exception:  # of the network
            logging.getLogger(__name__).exception("a prediction failed")
            response = _json({"error": "the prediction failed; the server's standard error says why"}, 500)
        self.requests.labels(str(response.status_code)).inc()
        self.seconds.observe(time.perf_counter() - begun)
        return response

    async def _predict(self, request: Request) -> Response:
        self._require_key(request)
        requested = read_parameters(request)
        form = replace(self.network.description.form, invert=requested.invert)
        if requested.maps and self.network.description.maps == "none":
            raise RefusedError(400, "this network's export has no score maps")
        if self.batcher.images >= self.limits.waiting_images:
            raise overloaded()  # before the upload is read
        try:
            async with asyncio.timeout(None) as answer:
                image = await self._receive(request, form, answer)
                scores = await self.batcher.score(image, requested.maps)
        except ImageTooLargeError as error:
            raise RefusedError(413, f"the image is too large: {error}") from None
        except ImageError as error:
            raise RefusedError(400, f"the image cannot be read: {error}") from None
        except OverloadedError:
            raise overloaded() from None
        except TimeoutError:
            raise RefusedError(503, "the server is overloaded: no answer in time") from None
        return _json(self._answer(scores, image, requested))

    def _answer(self, scores: Scores, image: np.ndarray, requested: Parameters) -> dict[str, Any]:
        names, probabilities = self.network.description.class_names, scores.probabilities
        order = (-probabilities).argsort(kind="stable").tolist()
        shown = order[: requested.top]
        answer: dict[str, Any] = {
            "class": names[order[0]],
            "probability": round(float(probabilities[order[0]]), 9),
            "probabilities": {names[i]: round(float(probabilities[i]), 9) for i in shown},
        }
        if requested.maps and scores.maps is not None:  # another request of the batch may want them too
            answer["image"] = {"height": image.shape[0], "width": image.shape[1]}
            answer["logits"] = {names[i]: round(float(scores.logits[i]), 6) for i in shown}
            answer["maps"] = {names[i]: np.round(scores.maps[i].astype(np.float64), 6).tolist() for i in shown}
        return answer

    async def _receive(self, request: Request, form: ImageForm, answer: asyncio.Timeout) -> np.ndarray:
        """The image; the time for its answer begins when the body has arrived."""
        parts: list[bytes] = []
        try:
            await self._read_body(request, parts)
            answer.reschedule(asyncio.get_running_loop().time() + self.limits.seconds)
            body = b"".join(parts)
            if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
                body = await read_file(request, body)
            elif not body:
                raise RefusedError(400, "the body is empty: send an image's bytes, or a form with a file")
            return await self._decode(body, form)
        finally:
            self.body_bytes -= sum(map(len, parts))

    async def _read_body(self, request: Request, parts: list[bytes]) -> None:
        """Adds what arrives to ``parts`` and to the bytes of all bodies."""
        limit, size = self.limits.body_bytes, 0
        too_large = RefusedError(413, f"the body is too large: the limit is {limit:,} bytes", {"connection": "close"})
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > 2 * limit:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > 2 * limit:
                        raise too_large
                    if size > limit:  # most clients read no answer before all is sent
                        continue
                    if size > SMALL_BYTES and self.body_bytes + len(part) > self.limits.all_body_bytes:
                        raise overloaded()
                    parts.append(part)
                    self.body_bytes += len(part)
        except TimeoutError:
            raise RefusedError(408, "the body did not arrive in time", {"connection": "close"}) from None
        if size > limit:
            raise too_large

    async def _decode(self, body: bytes, form: ImageForm) -> np.ndarray:
        opened = open_image(body, self.limits.pixels) if len(body) <= SMALL_IMAGE_BYTES else None
        if opened and opened.width * opened.height <= SMALL_PIXELS:
            return form.read(opened)
        with self.batcher.reserve(0):  # pixels take memory, and are counted, once they are decoded

            def read() -> np.ndarray:
                return form.read(opened or open_image(body, self.limits.pixels))

            return await asyncio.get_running_loop().run_in_executor(self.decoder, read)

    def _require_key(self, request: Request) -> None:
        if self.key is None:
            return
        # The scheme's case does not matter (RFC 9110, 11.1), as that of the content type.
        authorization = re.sub("^bearer ", "", request.headers.get("authorization", ""), flags=re.IGNORECASE)
        given = request.headers.get("x-api-key") or authorization
        # The key's bytes as they are in the environment, where they may be no UTF-8.
        if not hmac.compare_digest(given.encode("latin-1"), os.fsencode(self.key)):
            raise RefusedError(401, "a key is needed: Authorization: Bearer …", {"www-authenticate": "Bearer"})

    async def health(self, _: Request) -> Response:
        """GET /health: 200 as long as the process answers."""
        return _json({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """GET /ready: 200 if a prediction would be accepted now."""
        full = self.batcher.images >= self.limits.waiting_images
        state = "stopping" if self.is_stopping() else "overloaded" if full else "ready"
        return _json({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: Prometheus' text format."""
        self._require_key(request)
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def info(self, _: Request) -> Response:
        """GET /info: class names, sizes, and what is known of the run."""
        known = self.network.description
        about = {name: getattr(known, name) for name in ("class_names", "channels", "image_size", "light_on_dark")}
        about |= {"fit": known.fit or "stretch", "maps": known.maps != "none", "key": self.key is not None}
        return _json(about | known.more)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content, ensure_ascii=False), status, headers, "application/json")


def _page(name: str, media_type: str) -> Response:
    # Nothing from elsewhere is loaded: the page works offline, and a picture's name cannot bring in a script.
    policy = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' blob: data:"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
    return Response((PAGES / name).read_bytes(), headers=headers, media_type=media_type)


async def _http_error(_: Request, error: HTTPException) -> Response:
    return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))
