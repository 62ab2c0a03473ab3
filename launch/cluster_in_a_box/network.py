"""Building a cluster, reading its counters, taking it down."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from launch.cluster_in_a_box import registry
from launch.cluster_in_a_box.cluster import Cluster, up_commands
from launch.cluster_in_a_box.errors import BoxError

if TYPE_CHECKING:
    from collections.abc import Iterator

Counters = dict[str, dict[str, int]]
HINTS = {
    "Specified qdisc kind is unknown": "this kernel has no token bucket; try `modprobe sch_tbf`",
    "Operation not permitted": "it needs the capabilities NET_ADMIN and SYS_ADMIN; a container "
    "has them with `docker run --privileged`",
    "Unknown device type": "this kernel lacks veth, bridge or tap devices",
}


def check_machine() -> None:
    """Whether a cluster can be made here.

    Raises:
        BoxError: naming what is missing.
    """
    if not sys.platform.startswith("linux"):
        msg = f"a cluster in a box needs Linux's network namespaces; this is {sys.platform}"
        raise BoxError(msg)
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        msg = (
            f"{' and '.join(missing)} not found; install the package iproute2 "
            "(Debian, Ubuntu, Arch), or iproute and iproute-tc (Fedora, RHEL)"
        )
        raise BoxError(msg)
    if os.geteuid() != 0:
        msg = "only root may make network namespaces; start it again with sudo"
        raise BoxError(msg)


def up(cluster: Cluster, *, is_kept: bool) -> None:
    """Make the cluster; what is half made is taken down again.

    Args:
        cluster: what to make.
        is_kept: whether it stays when this process ends.

    Raises:
        BoxError: there is one of this name, or the machine cannot.
    """
    registry.claim(cluster)
    taken = set(cluster.namespaces) & namespaces()
    if taken:
        registry.release(cluster)
        msg = f"namespaces {sorted(taken)} are there, and not this tool's; choose another --name"
        raise BoxError(msg)
    try:
        for command in up_commands(cluster):
            call(command)
        if cluster.delay_ms > 0:
            _start_wires(cluster)
        if is_kept:
            registry.keep(cluster)
    except BaseException:
        down(cluster)
        raise


def down(cluster: Cluster) -> None:
    """Kill what runs in the cluster's namespaces and remove them. Does no harm twice."""
    existing = [name for name in cluster.namespaces if name in namespaces()]
    for name in existing:
        for pid in _processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for name in existing:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    registry.release(cluster)


def end_abandoned(cluster: Cluster) -> None:
    """Kill what a `run` that was killed itself left in a cluster that stays."""
    for name in namespaces() & set(cluster.namespaces):
        for pid in filter(registry.is_abandoned, _processes(name)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def built(cluster: Cluster) -> Iterator[None]:
    """The cluster for the duration of a block."""
    up(cluster, is_kept=False)
    try:
        yield
    finally:
        down(cluster)


def counters(cluster: Cluster) -> Counters:
    """Bytes and packets sent and received by each node's interface and each rack's trunk.

    Names are n0, n1, ... and trunk0, trunk1, ...; a trunk sends what leaves its rack.
    """
    places = {f"n{node}": (cluster.namespace(node), "eth0") for node in range(cluster.nodes)}
    if cluster.racks > 1:
        places |= {f"trunk{rack}": (cluster.switch, f"t{rack}") for rack in range(cluster.racks)}
    return {name: _read(*place) for name, place in places.items()}


def call(command: tuple[str, ...]) -> str:
    """Run a command; its stdout.

    Raises:
        BoxError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()
        hints = [hint for text, hint in HINTS.items() if text in said]
        msg = f"`{' '.join(command)}` failed: {said}" + "".join(f"; {hint}" for hint in hints)
        raise BoxError(msg)
    return done.stdout


def namespaces() -> set[str]:
    """The named network namespaces of this machine."""
    return {line.split()[0] for line in call(("ip", "netns", "list")).splitlines() if line}


def _processes(namespace: str) -> list[int]:
    return [int(pid) for pid in call(("ip", "netns", "pids", namespace)).split()]


def _read(namespace: str, device: str) -> dict[str, int]:
    found = call(("ip", "-n", namespace, "-s", "-j", "link", "show", "dev", device))
    statistics = json.loads(found)[0]["stats64"]
    return {
        f"{way}_{what}": int(statistics[key][what])
        for way, key in (("sent", "tx"), ("received", "rx"))
        for what in ("bytes", "packets")
    }


def _start_wires(cluster: Cluster) -> None:
    """The process that carries packets with delay; it lives in the switch's namespace."""
    module = [sys.executable, "-m", "launch.cluster_in_a_box.wires"]
    arguments = [cluster.name, str(cluster.nodes), str(cluster.delay_ms)]
    process = subprocess.Popen(
        ["ip", "netns", "exec", cluster.switch, *module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _, said = process.communicate()
        msg = f"the delaying wires could not start: {said.strip().splitlines()[-1:]}"
        raise BoxError(msg)
    process.returncode = 0  # it outlives us; nobody waits for it
    time.sleep(0.05)
