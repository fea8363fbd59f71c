"""The HTTP service: what it answers, what it refuses, and how it ends."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import Mock, call

import numpy as np
import pytest

import nin
from deploy.server import Server, serve
from pictures import encode

LIMITS = ("--max-megabytes", "2", "--max-megapixels", "4")


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[Server]:
    with serve(export, *LIMITS, "--timeout", "60") as running:  # no request is too slow, however busy the machine is
        yield running


def test_a_test_image_gets_the_probabilities_of_the_export(
    server: Server, export: Path, test_images: np.ndarray
) -> None:
    network = nin.load(export)
    expected = network.score(test_images[:20], maps=True)
    names = network.description.class_names
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda image: server.request("POST", "/predict", encode(image)), test_images[:20]))
    for i, (status, answer, _) in enumerate(answers):
        assert status == 200
        assert [answer["probabilities"][n] for n in names] == pytest.approx(expected.probabilities[i], abs=1e-5)
        assert answer["class"] == names[int(expected.probabilities[i].argmax())]
        assert list(answer["probabilities"]) == sorted(names, key=lambda n: -answer["probabilities"][n])
    _, answer, _ = server.request("POST", "/predict?maps=true&top=2", encode(test_images[3]))
    assert len(answer["maps"]) == len(answer["logits"]) == len(answer["probabilities"]) == 2
    best = answer["class"]
    np.testing.assert_allclose(answer["maps"][best], expected.maps[3][names.index(best)], atol=1e-4)
    assert np.mean(answer["maps"][best]) == pytest.approx(answer["logits"][best], abs=1e-4)


def test_forms_other_formats_and_inverted_images(server: Server, test_images: np.ndarray) -> None:
    expected = server.request("POST", "/predict", encode(test_images[0]))[1]
    note = b'--x\r\nContent-Disposition: form-data; name="note"\r\n\r\nhi\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    file += encode(test_images[0]) + b"\r\n"
    form = note + file + b"--x--\r\n"
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    assert server.request("POST", "/predict", form, multipart)[1] == expected
    assert server.request("POST", "/predict", form, {"Content-Type": "Multipart/Form-Data; boundary=x"})[1] == expected
    # The second is decoded by another thread.
    for image in (test_images[0], np.kron(test_images[0], np.ones((5, 5), np.uint8))):
        expected = server.request("POST", "/predict", encode(image))[1]
        assert server.request("POST", "/predict?invert=true", encode(255 - image))[1] == expected
    for files, number in ((b"", "no file"), (file + file, "2 files")):
        answer = server.request("POST", "/predict", note + files + b"--x--\r\n", multipart)
        assert answer[:2] == (400, {"error": f"the form has {number}: send one image"})
    for broken in (form[:60], b"no form"):
        assert server.request("POST", "/predict", broken, multipart)[0] == 400
    assert server.request("POST", "/predict", form, {"Content-Type": "multipart/form-data"})[0] == 400


def test_what_is_refused(server: Server) -> None:
    large, small = (encode(np.zeros((side, side), np.uint8)) for side in (2001, 28))
    progressive = encode(np.zeros((316, 316, 3), np.uint8), "jpeg", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    refused = [
        (400, "POST", "/predict", b"<html></html>"),
        (400, "POST", "/predict", encode(np.zeros((28, 28), np.uint8))[:50]),
        (400, "POST", "/predict", progressive[:-2] + last_scan * 1000 + progressive[-2:]),
        (400, "POST", "/predict", encode(np.zeros((32, 32), np.uint8), "ico")),
        (400, "POST", "/predict", b""),
        (400, "POST", "/predict?maps=perhaps", b"x"),
        (400, "POST", "/predict?top=0", b"x"),
        (400, "POST", "/predict?top=", b"x"),
        (400, "POST", "/predict?topp=1", small),
        (400, "POST", "/predict?top=1&top=2", small),
        (413, "POST", "/predict", large),
        (413, "POST", "/predict", bytes(2_000_001)),
        (413, "POST", "/predict", (bytes(100_000) for _ in range(1000))),  # of no declared length
        (404, "GET", "/nowhere", None),
        (404, "POST", "/predict/", None),
        (400, "POST", "/predict", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
        (404, "GET", "/../../etc/passwd", None),
        (405, "GET", "/predict", None),
    ]
    for status, method, path, body in refused:
        try:
            found, answer, _ = server.request(method, path, body)
        except (BrokenPipeError, ConnectionResetError):
            # The answer came, and the connection was closed, before all was sent.
            assert status == 413
            continue
        assert (found, list(answer)) == (status, ["error"]), (path, answer)
    assert server.request("POST", "/predict", encode(np.zeros((1, 1), np.uint8)))[0] == 200


def send_for_ever(client: socket.socket) -> None:
    while True:
        client.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")


SLOW = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nab"


def test_an_endless_upload_ends_and_nobody_waits_for_it_or_for_a_slow_one(server: Server) -> None:
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address, 30) as slow, socket.create_connection(address, 30) as endless:
        slow.sendall(SLOW)
        endless.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_for_ever(endless)
        assert server.request("POST", "/predict", encode(np.zeros((28, 28), np.uint8)))[0] == 200


def test_a_slow_upload_ends(export: Path) -> None:
    with (
        serve(export, *LIMITS, "--timeout", "1") as server,
        socket.create_connection(("127.0.0.1", server.port), 30) as slow,
    ):
        slow.sendall(SLOW)
        with slow.makefile("rb") as answer:  # to the end: the server closes the connection
            assert answer.read().startswith(b"HTTP/1.1 408")


def test_a_client_that_reads_after_it_has_sent_all_gets_the_413(server: Server) -> None:
    for head in (b"Content-Length: 3900000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n3B8260\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), 30) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n" + head)
            for _ in range(3):
                client.sendall(bytes(1_300_000))
                time.sleep(0.1)
            client.sendall(b"\r\n0\r\n\r\n" if b"chunked" in head else b"")
            assert client.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.long
def test_large_uploads_fill_no_more_memory_than_allowed_and_small_ones_are_answered(export: Path) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n"
    with serve(export, *LIMITS, "--timeout", "60") as server, contextlib.ExitStack() as clients:
        large = [clients.enter_context(socket.create_connection(("127.0.0.1", server.port), 30)) for _ in range(20)]
        for client in large:  # 38 MB of bodies that never end; the limit is 16 times 2 MB
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(head + bytes(1_900_000))
        assert server.request("POST", "/predict", encode(np.zeros((28, 28), np.uint8)))[0] == 200
        answered = []
        deadline = time.monotonic() + 60
        while len(answered) < 4 and time.monotonic() < deadline:
            for client in select.select(large, [], [], 1)[0]:
                with contextlib.suppress(ConnectionResetError):  # refused before all was sent
                    assert client.recv(100)[9:12] == b"503"
                answered.append(client)
                large.remove(client)
        assert len(answered) == 4
        assert not select.select(large, [], [], 0.5)[0]  # the others have their memory, and wait for the rest
        for client in large:
            client.close()
        while (status := server.request("POST", "/predict", bytes(1_900_000))[0]) == 503:  # until that is noticed
            assert time.monotonic() < deadline
        assert status == 400  # no image, but there is room for it


def read_answer(reader: BinaryIO) -> tuple[int, Any]:
    status = int(reader.readline().split()[1])
    return status, json.loads(reader.read(int(http.client.parse_headers(reader)["content-length"])))


def test_an_offered_upgrade_is_ignored(server: Server, test_images: np.ndarray) -> None:
    image, hidden = encode(test_images[0]), b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n"
    expected = (200, server.request("POST", "/predict", image)[1])
    offer = (
        b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAM\r\nUpgrade: "
    )
    head = offer + b"h2c\r\nContent-Length: %d\r\n\r\n" % len(image)
    chunked = offer + b"h2c\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(image)
    get = b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    no_image = server.request("POST", "/predict", hidden)[:2]
    requests = [
        ([head + image], [expected]),
        ([head, image], [expected]),
        ([head[:150], head[150:] + image[:99], image[99:]], [expected]),
        ([chunked + image + b"\r\n", b"0\r\n\r\n"], [expected]),
        ([get + head + image + get], [(200, {"status": "ok"}), expected, (200, {"status": "ok"})]),
        # A proxy that forwards the offer takes this for a body, which must not become a request of its own.
        ([offer + b"x\r\nContent-Length: %d\r\n\r\n" % len(hidden), hidden], [no_image]),
        ([head.replace(b": Up", b": close, Up"), image], [expected]),
    ]
    with socket.create_connection(("127.0.0.1", server.port), 30) as client, client.makefile("rb") as reader:
        for parts, answers in requests:  # all on one connection, which stays open
            for part in parts:
                client.sendall(part)
                time.sleep(0.05)  # so that the parts arrive one by one
            assert [read_answer(reader) for _ in answers] == answers
        assert reader.read() == b""
    with socket.create_connection(("127.0.0.1", server.port), 30) as client, client.makefile("rb") as reader:
        client.sendall(b"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n" + hidden)  # requests a tunnel
        assert reader.read().startswith(b"HTTP/1.1 400 Bad Request")


def test_an_endless_head_is_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX-Long: ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(1000):  # ten megabytes at most
                client.sendall(b"a" * 10_000)
                if select.select([client], [], [], 0)[0]:
                    break
        assert client.recv(1000).startswith(b"HTTP/1.1 431")


class Connection:
    """A connection of the server's protocol in this process, with no answers; its timers never end."""

    def __init__(self) -> None:
        from uvicorn import Config
        from uvicorn.server import ServerState

        from nin.deploy.server import TimedProtocol

        self.timers: list[Mock] = []
        self.loop, self.transport = Mock(), Mock()
        self.loop.call_later.side_effect = self.call_later
        self.loop.create_task.side_effect = lambda coroutine, **_: coroutine.close() or Mock()
        self.transport.get_extra_info.return_value = None
        self.transport.is_closing.return_value = False
        config = Config(Mock(), ws="none", log_config=None)
        self.protocol = TimedProtocol(config, ServerState(), {}, self.loop)
        self.protocol.connection_made(self.transport)

    def call_later(self, *_: object) -> Mock:
        self.timers.append(Mock())
        return self.timers[-1]

    def cancelled(self) -> list[bool]:
        return [timer.cancel.called for timer in self.timers]


def test_a_connection_on_which_no_head_arrives_in_time_is_closed() -> None:
    connection = Connection()
    protocol, cancelled = connection.protocol, connection.cancelled
    assert cancelled() == [False]
    protocol.data_received(b"GET / HTTP/1.1\r\n")
    assert cancelled() == [True, False]  # a head has the whole time from its first byte on
    protocol.data_received(b"Host: x\r\n\r\n")
    assert cancelled() == [True, True]
    protocol.data_received(b"GET /")
    assert cancelled() == [True, True, False]
    protocol.connection_lost(None)
    assert cancelled() == [True, True, True]
    assert connection.loop.call_later.call_args_list == [call(15, connection.transport.close)] * 3


def test_a_body_does_not_count_as_the_next_head_after_it() -> None:
    connection = Connection()
    protocol, write = connection.protocol, connection.transport.write
    protocol.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + bytes(100_000))
    protocol.data_received(bytes(100_000) + b"GET /")
    protocol.data_received(b" HTTP/1.1\r\nX-Long: ".ljust(65_536, b"a"))
    write.assert_not_called()
    protocol.data_received(b"a")
    assert write.call_args.args[0].startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize(
    ("head", "begun", "ended"),
    [
        (b"\r\n", b"\r\n", b""),
        (b"Content-Length: 10\r\n\r\n", b"x", b"x" * 9),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"5", b"\r\n12345\r\n0\r\n\r\n"),
    ],
)
def test_only_the_next_request_keeps_an_answered_connection_open(head: bytes, begun: bytes, ended: bytes) -> None:
    connection = Connection()
    protocol, cancelled = connection.protocol, connection.cancelled
    protocol.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n" + head)
    protocol.cycle.response_complete = True
    protocol.on_response_complete()
    handler = connection.loop.call_later.call_args.args[1]
    assert handler == protocol.timeout_keep_alive_handler
    protocol.data_received(begun)
    protocol.data_received(ended)
    assert cancelled() == [True, True, False]
    protocol.data_received(b"GET /")
    assert cancelled() == [True, True, True, False]
    handler()
    connection.transport.close.assert_called_once_with()


def test_clients_that_vanish_leave_nothing_behind(server: Server, test_images: np.ndarray) -> None:
    body = encode(test_images[0])
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for i in range(60):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall((head + body)[: None if i % 2 else 100])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    begun = time.monotonic()
    while b"nin_waiting_images 0.0" not in server.request("GET", "/metrics")[1]:
        assert time.monotonic() < begun + 20
    assert server.request("POST", "/predict", body)[0] == 200


def test_health_metrics_description_and_pages(server: Server, test_images: np.ndarray) -> None:
    assert server.request("GET", "/health")[:2] == (200, {"status": "ok"})
    assert server.request("GET", "/ready")[:2] == (200, {"status": "ready"})
    about = server.request("GET", "/info")[1]
    assert (about["run"], about["class_names"][1], about["maps"]) == ("small", "Trouser", True)
    api = server.request("GET", "/openapi.json")[1]
    assert set(api["paths"]) == {"/predict", "/health", "/ready", "/metrics", "/info"}
    for page in ("/", "/docs"):
        status, content, headers = server.request("GET", page)
        assert status == 200
        assert headers["content-type"].startswith("text/html")
        # Works offline: nothing but the server itself is named.
        assert b"http" not in content.replace(b"http://127.0.0.1:8000", b"")
        assert "default-src 'self'" in headers["content-security-policy"]
    assert server.request("POST", "/predict", encode(test_images[0]))[0] == 200
    metrics = server.request("GET", "/metrics")[1].decode()
    assert 'nin_requests_total{status="200"}' in metrics
    assert "nin_batch_images_bucket" in metrics


def test_a_key_is_demanded_where_it_is_set(export: Path, test_images: np.ndarray) -> None:
    with serve(export, NIN_API_KEY="secret-ü\n") as server:  # as a file holds it
        for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": "Bearer"}):
            assert server.request("POST", "/predict", encode(test_images[0]), headers)[0] == 401
            assert server.request("GET", "/metrics", None, headers)[0] == 401
        key = "secret-ü".encode().decode("latin-1")
        for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}, {"Authorization": f"bearer {key}"}):
            assert server.request("POST", "/predict", encode(test_images[0]), headers)[0] == 200
        assert server.request("GET", "/health")[0] == 200


@pytest.mark.parametrize("key", ["", " \n"])
def test_an_empty_key_is_no_permission_to_serve_without_one(
    export: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    from nin.commands.serve import main
    from nin.config.schema import UserError

    monkeypatch.setenv("NIN_API_KEY", key)
    monkeypatch.setattr("nin.deploy.server.run", lambda *_: pytest.fail("it serves"))
    with pytest.raises(UserError, match=r"^NIN_API_KEY is empty: set it to a key, or remove it"):
        main([str(export), "--port", "0"])


def test_sigterm_answers_what_has_begun_and_ends_with_143(export: Path, test_images: np.ndarray) -> None:
    body = encode(test_images[0])
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with serve(export) as server, socket.create_connection(("127.0.0.1", server.port), 30) as client:
        client.sendall(head.encode() + body[:-1])
        malformed = server.request("POST", "/predict", b"--y--", {"Content-Type": "multipart/form-data; boundary=x"})
        assert malformed[0] == 400  # by now the other request has begun
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionRefusedError):
            while True:  # until it listens no longer
                socket.create_connection(("127.0.0.1", server.port), 30).close()
                time.sleep(0.01)
        client.sendall(body[-1:])
        assert client.recv(10_000).startswith(b"HTTP/1.1 200")
        assert server.process.wait(30) == 143
        assert server.process.stderr.read() == ""


def test_a_signal_before_the_server_has_its_own_handlers_ends_it(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nin.deploy import server as module
    from nin.deploy.loading import load
    from nin.deploy.service import Limits, Service

    monkeypatch.setattr(module.gc, "freeze", lambda: os.kill(os.getpid(), signal.SIGTERM))
    service = Service(load(export), Limits(2_000_000, 4_000_000, 256, 3), None)
    serves: list[bool] = []

    async def main_loop(server: Any) -> None:
        serves.append(not server.should_exit)

    monkeypatch.setattr(module.uvicorn.Server, "main_loop", main_loop)
    with module.listen("127.0.0.1", 0) as listener:
        assert module.run(service, listener) == 143
    assert True not in serves


@pytest.mark.parametrize(("timeout", "seconds", "graceful"), [(3, 15, 6), (30.5, 31, 61)])
def test_the_next_request_may_follow_an_answer_within_the_timeout_and_15_seconds_at_least(
    timeout: float, seconds: int, graceful: int, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a server that is to stop waits for an upload and its answer."""
    from nin.deploy import server as module
    from nin.deploy.loading import load
    from nin.deploy.service import Limits, Service

    configs: list[Any] = []
    monkeypatch.setattr(module.uvicorn.Server, "run", lambda server, sockets: configs.append(server.config))
    with module.listen("127.0.0.1", 0) as listener:
        assert module.run(Service(load(export), Limits(2_000_000, 4_000_000, 256, timeout), None), listener) == 0
    (config,) = configs
    assert (config.timeout_keep_alive, config.timeout_graceful_shutdown) == (seconds, graceful)


def test_a_wrong_argument_and_a_port_in_use_are_one_line(server: Server, export: Path) -> None:
    from nin.commands.serve import main
    from nin.config.schema import UserError

    for option, value in (("--timeout", "0"), ("--max-waiting", "0")):
        with pytest.raises(UserError, match=rf"^{option} {value}\S*: "):
            main([str(export), option, value])
    for words, place in ((["--host", "256.1.1.1"], "256.1.1.1:8000"), (["--port", "99999"], "127.0.0.1:99999")):
        with pytest.raises(UserError, match=rf"^{place}: can't listen there \("):
            main([str(export), *words])
    with pytest.raises(UserError, match=rf"^127.0.0.1:{server.port}: can't listen there \(Address already in use\); "):
        main([str(export), "--port", str(server.port)])
