"""A headless Chromium, driven through its DevTools protocol."""

import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One page of a browser."""

    def __init__(self, connection: ClientConnection):
        self.connection, self.numbers, self.events = connection, itertools.count(1), list[dict[str, Any]]()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result; events that come in between are kept."""
        number = next(self.numbers)
        self.connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.connection.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        begun = time.monotonic()
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") != url:
            assert time.monotonic() < begun + 60
            time.sleep(0.1)

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Presses the mouse at the first point of the page, moves it over the others, and releases it."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
            buttons = 0 if kind == "mouseReleased" else 1
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1)


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser that ends with the context. All that it loads is reported as events."""
    assert CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--window-size=1000,900", "about:blank"]
        process = subprocess.Popen([CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port_file, begun = Path(profile) / "DevToolsActivePort", time.monotonic()
            while not (port_file.exists() and port_file.read_text().count("\n")):
                assert process.poll() is None, "chromium ended"
                assert time.monotonic() < begun + 60, "chromium did not start"
                time.sleep(0.1)
            port = port_file.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                address = next(t["webSocketDebuggerUrl"] for t in json.load(answer) if t["type"] == "page")
            with connect(address, max_size=None) as connection:
                page = Page(connection)
                for domain in ("Page", "Runtime", "Network"):
                    page.call(f"{domain}.enable")
                yield page
        finally:
            process.terminate()
            process.wait()
