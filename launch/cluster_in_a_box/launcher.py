"""One launcher a node: torchrun in every namespace, watched together."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster_in_a_box import registry
from launch.cluster_in_a_box.errors import BoxError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

    from launch.cluster_in_a_box.cluster import Cluster

PORT = 29_500
GRACE_SECONDS = 20.0
POLL_SECONDS = 0.05


def launch(
    cluster: Cluster,
    command: Sequence[str],
    *,
    per_node: bool,
    timeout: float | None,
    stdout: IO[str] | None = None,
) -> int:
    """Run a command on every node, wait for all.

    Args:
        cluster: where; it must be up.
        command: what every rank runs.
        per_node: run it once a node instead, without torchrun.
        timeout: seconds after which everything is stopped; None for no limit.
        stdout: where the ranks' output goes; None for our own.

    Returns:
        0, or the first exit code of a node that failed: 124 at a timeout, 128 + n after signal n.
        Once one has failed, the others are given a moment and then stopped.
    """
    environment = _environment(cluster)
    check_command(command, environment["PATH"])
    nodes: list[subprocess.Popen[str]] = []
    try:
        for node in range(cluster.nodes):
            argv = node_command(cluster, node, command, per_node=per_node)
            variables = environment | {"NODE_RANK": str(node)}
            nodes.append(
                subprocess.Popen(
                    argv, env=variables, stdout=stdout, text=True, start_new_session=True
                )
            )
        return _wait(nodes, timeout)
    finally:
        _stop(nodes)


def check_command(command: Sequence[str], path: str) -> None:
    """Whether there is a program to run.

    Raises:
        BoxError: there is none.
    """
    if not command:
        msg = "nothing to run: give a command after --, as in `run -- exflow run MODEL ...`"
        raise BoxError(msg)
    if shutil.which(command[0], path=path) is None:
        msg = f"{command[0]!r} is no program that can be found; is its virtual environment active?"
        raise BoxError(msg)


def node_command(
    cluster: Cluster, node: int, command: Sequence[str], *, per_node: bool
) -> list[str]:
    """What starts one node's ranks, inside its namespace.

    Ranks are batch processes, whatever they run: more ranks than cores lose a third of their time to
    threads that interrupt each other.
    """
    inside = ["ip", "netns", "exec", cluster.namespace(node)]
    if per_node:
        return [*inside, *command]
    torchrun = [
        *("chrt", "--batch", "0"),
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(cluster.nodes), "--node-rank", str(node)),
        *("--nproc-per-node", str(cluster.ranks_per_node)),
        *("--master-addr", cluster.address(0), "--master-port", str(PORT)),
        *("--local-addr", cluster.address(node), "--no-python"),
    ]
    return [*inside, *torchrun, *command]


def _environment(cluster: Cluster) -> dict[str, str]:
    """Every library told to use the shaped interface; one thread a rank unless set."""
    interfaces = dict.fromkeys(
        ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "eth0"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    meeting = {
        "MASTER_ADDR": cluster.address(0),
        "MASTER_PORT": str(PORT),
        "NNODES": str(cluster.nodes),
        "BOX_SWITCH": cluster.switch,
        "BOX_RACKS": str(cluster.racks),
    }
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return os.environ | interfaces | meeting | threads | registry.mark() | {"PATH": path}


def _wait(nodes: Sequence[subprocess.Popen[str]], timeout: float | None) -> int:
    deadline = None if timeout is None else time.monotonic() + timeout
    failure, grace_end = 0, float("inf")
    while True:
        codes = [node.poll() for node in nodes]
        failed = [code for code in codes if code]
        if failed and not failure:
            failure = failed[0] if failed[0] > 0 else 128 - failed[0]
            grace_end = time.monotonic() + GRACE_SECONDS
        if None not in codes or time.monotonic() > grace_end:
            return failure
        if deadline is not None and time.monotonic() > deadline:
            return 124
        time.sleep(POLL_SECONDS)


def _stop(nodes: Sequence[subprocess.Popen[str]]) -> None:
    """End what still runs, politely first: torchrun ends its ranks, which it started apart."""
    running = [node for node in nodes if node.poll() is None]
    for node in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGTERM)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(node.poll() is None for node in running):
        time.sleep(POLL_SECONDS)
    for node in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()
