"""Requests to a service in this process: images that wait to be decoded, and what a form may have."""

import asyncio
import contextlib
import json
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from nin.deploy.requests import RefusedError, read_file
from nin.deploy.service import Limits, Service
from nin.deploy.trained import Description, Scores, TrainedNetwork
from pictures import encode

LIMITS = Limits(body_bytes=20_000_000, pixels=25_000_000, waiting_images=256, seconds=30)
SMALL, MANY_PIXELS = np.zeros((28, 28), np.uint8), np.zeros((500, 500), np.uint8)


def brightness(images: np.ndarray, maps: bool) -> Scores:
    values = images.reshape(len(images), -1)[:, :1].astype(np.float32)
    return Scores(values, values)


@contextlib.asynccontextmanager
async def busy_service(
    limits: Limits, predict: Callable[[np.ndarray, bool], Scores] = brightness
) -> AsyncIterator[tuple[Service, threading.Event]]:
    """A service whose decoder is busy until the event is set."""
    service = Service(TrainedNetwork(Description(["a"], 1, 28, 28, False, "gap", {}), predict), limits, None)
    service.batcher.start()
    done = threading.Event()
    service.decoder.submit(done.wait, 60)
    try:
        yield service, done
    finally:
        done.set()
        await asyncio.to_thread(service.decoder.shutdown)
        await asyncio.to_thread(service.batcher.close)


async def post(service: Service, body: bytes, query: bytes = b"") -> tuple[int, str]:
    """Status, and the error if any."""

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body}

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": query, "headers": []}
    response = await asyncio.wait_for(service.predict(Request(scope, receive)), 30)
    return response.status_code, json.loads(response.body).get("error", "")


def test_many_pixels_or_bytes_are_decoded_beside_the_event_loop() -> None:
    async def play() -> None:
        many_bytes = encode(SMALL, "tiff", tiffinfo={270: "x" * 30_000})
        async with busy_service(LIMITS) as (service, done):
            large = [asyncio.create_task(post(service, body)) for body in (encode(MANY_PIXELS), many_bytes)]
            assert await post(service, encode(SMALL)) == (200, "")
            assert not any(task.done() for task in large)
            assert service.batcher.images == 2
            done.set()
            assert await asyncio.gather(*large) == [(200, "")] * 2

    asyncio.run(play())


def test_images_that_wait_to_be_decoded_count_as_waiting() -> None:
    async def play() -> None:
        async with busy_service(replace(LIMITS, waiting_images=2)) as (service, done):
            tasks = [asyncio.create_task(post(service, encode(MANY_PIXELS))) for _ in range(5)]
            refused, waiting = set[asyncio.Task[Any]](), set(tasks)
            while len(refused) < 3:
                ended, waiting = await asyncio.wait(waiting, timeout=60, return_when=asyncio.FIRST_COMPLETED)
                assert ended
                refused |= ended
            assert [task.result() for task in refused] == [(503, "the server is overloaded")] * 3
            done.set()
            assert await asyncio.gather(*waiting) == [(200, "")] * 2
            assert (service.batcher.images, service.batcher.pixels, service.body_bytes) == (0, 0, 0)

    asyncio.run(play())


def test_as_many_pixels_wait_as_four_of_the_largest_images_have() -> None:
    go = threading.Event()

    def wait(images: np.ndarray, maps: bool) -> Scores:
        assert go.wait(60)
        return brightness(images, maps)

    async def play() -> None:
        async with busy_service(replace(LIMITS, pixels=SMALL.size), wait) as (service, _):
            tasks = [asyncio.create_task(post(service, encode(SMALL))) for _ in range(5)]
            try:
                ended, waiting = await asyncio.wait(tasks, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            finally:
                go.set()
            assert [task.result() for task in ended] == [(503, "the server is overloaded")]
            assert await asyncio.gather(*waiting) == [(200, "")] * 4

    asyncio.run(play())


def test_maps_that_an_export_does_not_have_are_refused() -> None:
    async def play() -> None:
        async with busy_service(LIMITS) as (service, _):
            service.network.description = replace(service.network.description, maps="none")
            message = "this network's export has no score maps"
            assert await post(service, encode(SMALL), b"maps=true") == (400, message)
            assert await post(service, encode(SMALL), b"maps=false") == (200, "")

    asyncio.run(play())


def test_a_server_that_is_full_or_stops_is_not_ready() -> None:
    async def play() -> None:
        async with busy_service(replace(LIMITS, waiting_images=1)) as (service, done):

            async def ready() -> tuple[int, str]:
                response = await service.ready(Request({"type": "http"}))
                return response.status_code, json.loads(response.body)["status"]

            assert await ready() == (200, "ready")
            waiting = asyncio.create_task(post(service, encode(MANY_PIXELS)))
            while not service.batcher.images:
                await asyncio.sleep(0)
            assert await ready() == (503, "overloaded")
            done.set()
            assert await waiting == (200, "")
            service.is_stopping = lambda: True
            assert await ready() == (503, "stopping")

    asyncio.run(play())


def test_the_time_for_an_answer_includes_decoding() -> None:
    async def play() -> None:
        async with busy_service(replace(LIMITS, seconds=0.1)) as (service, _):
            assert await post(service, encode(MANY_PIXELS)) == (503, "the server is overloaded: no answer in time")
            assert (service.batcher.images, service.batcher.pixels, service.body_bytes) == (0, 0, 0)

    asyncio.run(play())


def test_a_failure_of_the_network_is_answered_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail(images: np.ndarray, maps: bool) -> Scores:
        raise RuntimeError("bad allocation")

    async def play() -> None:
        async with busy_service(LIMITS, fail) as (service, done):
            done.set()
            message = "the prediction failed; the server's standard error says why"
            assert await post(service, encode(SMALL)) == (500, message)
            assert b'nin_requests_total{status="500"} 1.0' in (await service.metrics(Request({"type": "http"}))).body

    asyncio.run(play())
    (record,) = caplog.records
    assert "RuntimeError: bad allocation" in caplog.text
    assert record.levelname == "ERROR"


def test_a_form_is_read_where_no_temporary_file_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    photo = bytes(2_000_000)
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    request = Request({"type": "http", "headers": headers})
    assert asyncio.run(read_file(request, head + photo + b"\r\n--x--\r\n")) == photo


def test_a_parameter_among_the_fields_of_a_form_is_refused() -> None:
    field = b'--x\r\nContent-Disposition: form-data; name="invert"\r\n\r\ntrue\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nx\r\n--x--\r\n'
    request = Request({"type": "http", "headers": [(b"content-type", b"multipart/form-data; boundary=x")]})
    with pytest.raises(RefusedError, match=r"^400: invert: is a field of the form; give it in the address: /predict"):
        asyncio.run(read_file(request, field + file))


def test_a_charset_that_no_text_can_have_is_refused() -> None:
    field = b'--x\r\nContent-Disposition: form-data; name="\xe9"\r\n\r\nhi\r\n--x--\r\n'
    for charset in (b"undefined", b"\xff\x00"):
        content_type = b"multipart/form-data; charset=" + charset + b"; boundary=x"
        request = Request({"type": "http", "headers": [(b"content-type", content_type)]})
        with pytest.raises(RefusedError, match=r"^400: the form is malformed$"):
            asyncio.run(read_file(request, field))


def test_a_key_may_be_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environb, b"NIN_API_KEY", b"k\xff")
    description = Description(["a"], 1, 28, 28, False, "gap", {})
    service = Service(TrainedNetwork(description, brightness), LIMITS, os.environ["NIN_API_KEY"])
    known, unknown = (Request({"type": "http", "headers": [(b"x-api-key", key)]}) for key in (b"k\xff", b"k\xc3\xbf"))
    assert asyncio.run(service.metrics(known)).status_code == 200
    with pytest.raises(RefusedError, match=r"^401"):
        asyncio.run(service.metrics(unknown))
