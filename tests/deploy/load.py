"""A load of many clients on a running `nin serve`, beside what onnxruntime does alone on the same images.

    PYTHONPATH=tests python tests/deploy/load.py model.onnx --requests 10000 --clients 64

Starts `nin serve model.onnx`. Prints requests per second, their share of onnxruntime's rate, the CPU time of the server
and of this program's clients per request, the 99th percentile of the time, and failed requests.
Clients keep their connections, as a proxy in front of the server does; each sends its next image after the answer.
"""

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from deploy.server import serve
from nin.deploy.onnx_model import load_onnx
from pictures import encode


async def client(host: str, port: int, path: str, bodies: list[bytes], todo: list[int], seconds: list[float]) -> int:
    """Sends images until none is left to do; returns how many requests failed."""
    failed = 0
    reader, writer = await asyncio.open_connection(host, port)
    while todo:
        body = bodies[todo.pop() % len(bodies)]
        begun = time.perf_counter()
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in answer.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        content = await reader.readexactly(length)
        seconds.append(time.perf_counter() - begun)
        failed += not answer.startswith(b"HTTP/1.1 200") or not json.loads(content)
    writer.close()
    return failed


async def load(url: str, bodies: list[bytes], requests: int, clients: int) -> tuple[float, list[float], int]:
    parts, todo, seconds = urlsplit(url), list(range(requests)), list[float]()
    begun = time.perf_counter()
    work = (client(parts.hostname, parts.port, parts.path or "/predict", bodies, todo, seconds) for _ in range(clients))
    failed = sum(await asyncio.gather(*work))
    return time.perf_counter() - begun, seconds, failed


def alone(model: Path, images: np.ndarray, seconds: float = 5) -> float:
    """Images per second of onnxruntime in batches of 64, all cores."""
    network = load_onnx(model)
    network.predict(images)
    begun, done = time.perf_counter(), 0
    while time.perf_counter() < begun + seconds:
        network.predict(images)
        done += len(images)
    return done / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the server; default: all")
    args = parser.parse_args()
    images = np.random.default_rng(0).integers(0, 256, (64, 28, 28), dtype=np.uint8)
    bodies = [encode(image) for image in images]
    # onnxruntime alone before and after: a shared machine's rate varies.
    before = alone(args.model, images)
    with serve(args.model, "--threads", args.threads) as server:
        asyncio.run(load(f"{server.url}predict", bodies, 200, args.clients))  # to warm up
        cpu, own_cpu = server.cpu_seconds(), time.process_time()
        elapsed, seconds, failed = asyncio.run(load(f"{server.url}predict", bodies, args.requests, args.clients))
        cpu, own_cpu = server.cpu_seconds() - cpu, time.process_time() - own_cpu
    begun, own = time.process_time(), alone(args.model, images)
    of_image = (time.process_time() - begun) / (5 * own)
    limit, rate = (before + own) / 2, args.requests / elapsed
    print(f"{rate:,.0f} requests/s; onnxruntime alone {limit:,.0f} images/s: {rate / limit:.2f}")
    print(
        f"CPU time: server {1e3 * cpu / args.requests:.2f} ms per request, clients "
        f"{1e3 * own_cpu / args.requests:.2f} ms; onnxruntime alone {1e3 * of_image:.2f} ms per image"
    )
    print(f"median {1e3 * np.median(seconds):.1f} ms, 99th percentile {1e3 * np.percentile(seconds, 99):.1f} ms")
    print(f"failed: {failed} of {args.requests}")


if __name__ == "__main__":
    main()
