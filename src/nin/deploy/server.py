"""Runs the HTTP service until a signal ends it. Imports no torch.

Not with LitServe: each request passes through two more of its processes, which lowers the rate, and its processes
continued to run after SIGTERM.
"""

import gc
import logging
import math
import resource
import signal
import socket
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nin.config.schema import UserError
from nin.data.decoding import silence_pillow
from nin.deploy.service import Service

# A request's head has this long to arrive.
HEAD_SECONDS = 15
HEAD_BYTES = 65_536  # without the chunk in which it begins, which may hold another request's body


class TimedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol without upgrades; closes a connection whose next request's head is slow or endless."""

    deadline: Any = None
    head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.head_bytes += len(data)  # set to 0 if a head begins in this chunk
        # Not uvicorn's method, which takes the body of a request that offers an upgrade for the next request, and lets
        # any byte after an answer, not only the next request, stop the timer of a connection without requests.
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        if self.deadline is not None and self.head_bytes > HEAD_BYTES:  # the head is not complete
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head_bytes = 0
        self._stop_timer()
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        if not self.parser.should_upgrade():  # otherwise the head is parsed again
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _parse(self, data: memoryview) -> None:
        """Parses what arrived; a head that offers an upgrade is parsed again without the offer (RFC 9110, 7.8).

        Raises:
            httptools.HttpParserError: if it is no HTTP, or requests a tunnel.
        """
        while data:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":
                raise httptools.HttpParserError
            kept = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
            # The old parser would ignore all that follows a head with "Connection: close".
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self.parser.feed_data(b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(kept)))

    def _start_timer(self) -> None:
        self.deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        self._unset_keepalive_if_required()  # uvicorn's timer, which runs from an answer on
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: if the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(
            f"{host}:{port}: can't listen there ({getattr(error, 'strerror', None) or error}); give another --port "
            "or --host"
        ) from error
    return listener


def run(service: Service, listener: socket.socket) -> int:
    """Serves until SIGTERM or Ctrl-C, then answers the requests that have begun; returns the exit status."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = uvicorn.Config(
        service.app(),
        http=TimedProtocol,
        ws="none",
        log_level="critical",
        access_log=False,
        # From an answer until the next request. A refused request's body may still arrive, which takes its time.
        timeout_keep_alive=max(HEAD_SECONDS, math.ceil(service.limits.seconds)),
        timeout_graceful_shutdown=math.ceil(2 * service.limits.seconds),  # an upload and its answer
        # Connections; those above are answered with 503 while file descriptors are left.
        limit_concurrency=max(16, min(files - 64, 4096)),
        server_header=False,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    service.is_stopping = lambda: server.should_exit  # so that a load balancer sends nothing more
    received: list[int] = []

    def stop(signum: int, _: Any) -> None:
        received.append(signum)
        server.should_exit = True  # before uvicorn has its own handlers; it raises the signal again at its end

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a client's malformed form is no event here
    silence_pillow()
    gc.collect()
    gc.freeze()  # the collector need not scan again and again what is loaded by now and stays
    try:
        server.run(sockets=[listener])
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return 128 + received[0] if received else 0
