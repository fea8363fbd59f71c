"""`nin serve` in a process of its own."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers import ENVIRONMENT


class Server:
    def __init__(self, process: subprocess.Popen[str], port: int):
        self.process, self.port = process, port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, content (decoded if it is JSON) and headers, with names in lower case."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {}, encode_chunked=hasattr(body, "__next__"))
            answer = connection.getresponse()
            content = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, json.loads(content) if "json" in found["content-type"] else content, found
        finally:
            connection.close()

    def cpu_seconds(self) -> float:
        """CPU time that the process has taken."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


@contextlib.contextmanager
def serve(*arguments: object, **environment: str) -> Iterator[Server]:
    """A server on a free port, which ends with the context."""
    command = [sys.executable, "-m", "nin", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        found = re.search(r":(\d+)  \(Ctrl-C", line)
        assert found, line + (process.communicate()[1] if process.poll() is not None else "")
        yield Server(process, int(found[1]))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
