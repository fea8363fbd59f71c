"""Sweeps on a real Ray cluster: two nodes of one core each on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import ENVIRONMENT, SMALL, merge, outcome, run_experiment, wait_for
from nin.config.schema import Settings
from nin.runs.folder import RunFolder

RAY = Path(sys.executable).with_name("ray")
SEEDS = (0, 1, 2, 3)
# Long enough that both nodes are at work when one of them is killed.
JOB = (*SMALL, "trainer.max_epochs=12", "threads=1", "checkpoint.every_n_steps=2")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not RAY.exists(), reason="Ray is not installed: python3 -m uv sync --extra ray"),
]


def start_node(temporary: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A node of one core. All its processes are in one process group."""
    command = [str(RAY), "start", "--block", "--num-cpus=1", "--disable-usage-stats", *arguments]
    with (temporary / f"node{len(list(temporary.glob('node*')))}.txt").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=ENVIRONMENT)


def kill_node(node: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def has_nodes(address: str, count: int, node: subprocess.Popen[bytes]) -> bool:
    """Waits until the cluster has ``count`` nodes; whether it has, or ``node`` has ended or is too slow."""
    status = [str(RAY), "status", f"--address={address}"]
    until = time.monotonic() + 90
    while node.poll() is None and time.monotonic() < until:
        done = subprocess.run(status, capture_output=True, text=True, env=ENVIRONMENT)
        if done.stdout.count(" node_") >= count:
            return True
        time.sleep(1)
    return False


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a cluster of two nodes, and the second node."""
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(3):  # another process may take the port before Ray does
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            address, options = f"127.0.0.1:{port}", ("--node-ip-address=127.0.0.1", "--include-dashboard=false")
            nodes.append(start_node(tmp_path, "--head", f"--port={port}", *options))
            if has_nodes(address, 1, nodes[-1]):
                break
            kill_node(nodes.pop())
        assert nodes, [path.read_text() for path in tmp_path.glob("node*")]
        nodes.append(start_node(tmp_path, f"--address={address}"))
        assert has_nodes(address, 2, nodes[1]), [path.read_text() for path in tmp_path.glob("node*")]
        yield address, nodes[1]
    finally:
        for node in nodes:
            kill_node(node)


def test_a_node_is_lost_and_all_jobs_end_with_the_weights_of_single_runs(
    cluster: tuple[str, subprocess.Popen[bytes]], tmp_path: Path, data_root: Path, settings: Callable[..., Settings]
) -> None:
    address, second = cluster
    words = merge([*JOB, f"data.root={data_root}", "hydra/launcher=ray", f"hydra.launcher.ray.init.address={address}"])
    sweep = tmp_path / "outputs" / "sweeps" / "ray"
    command = [sys.executable, "-m", "nin", "train", "-m", *words, "name=ray", f"seed={','.join(map(str, SEEDS))}"]
    with (tmp_path / "sweep.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log, text=True)
        for seed in SEEDS[:2]:  # one on each node
            wait_for(sweep / f"seed={seed}" / "checkpoints" / "last.ckpt", process)
        kill_node(second)
        assert process.wait(timeout=400) == 0, (tmp_path / "sweep.txt").read_text()[-4000:]
    resumes = []
    for seed in SEEDS:
        result = RunFolder(sweep / f"seed={seed}").read_result()
        assert result
        own = [word for word in JOB if word not in SMALL]
        expected = run_experiment(settings(*own, f"seed={seed}"), RunFolder(tmp_path / f"alone-{seed}"))
        assert outcome(result) == outcome(expected)
        resumes.append(result["resumes"])
    assert sum(resumes) >= 1  # of the job on the lost node
