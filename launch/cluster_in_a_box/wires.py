"""Cables with delay, for kernels without netem: a process that carries packets between taps.

    python -m launch.cluster_in_a_box.wires NAME NODES DELAY_MS

Each node's cable is a tap in its namespace and one at the bridge. A packet is held for half of the
delay on the way up and for half on the way down. Rates are the taps' own (tc tbf on both).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
TAP_WITHOUT_HEADER = 0x1002
LARGEST_FRAME = 65_600
PACKETS_AT_ONCE = 64


def main() -> None:
    """Open both ends of every cable, say so, and carry packets until killed."""
    name, nodes, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1000
    peers: dict[int, int] = {}
    for node in range(nodes):
        up = open_tap(f"{name}-n{node}", "eth0")
        down = open_tap(f"{name}-sw", f"p{node}")
        peers |= {up: down, down: up}
    enter(f"{name}-sw")
    print("ready", flush=True)
    carry(peers, delay / 2)


def carry(peers: dict[int, int], delay: float) -> None:
    """Read packets from any end; write each to the other end when its time has come."""
    held: deque[tuple[float, int, bytes]] = deque()
    poll = select.epoll()
    for descriptor in peers:
        poll.register(descriptor, select.EPOLLIN)
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else -1
        for descriptor, _ in poll.poll(wait):
            due = time.monotonic() + delay
            held.extend((due, peers[descriptor], packet) for packet in read_packets(descriptor))
        now = time.monotonic()
        while held and held[0][0] <= now:
            _, destination, packet = held.popleft()
            write_packet(destination, packet)


def read_packets(descriptor: int) -> list[bytes]:
    """What waits at a tap, up to a fair share."""
    packets: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while len(packets) < PACKETS_AT_ONCE:
            packets.append(os.read(descriptor, LARGEST_FRAME))
    return packets


def write_packet(descriptor: int, packet: bytes) -> None:
    """Hand a packet to a tap; one that it does not take is lost, as on a cable."""
    with contextlib.suppress(OSError):
        os.write(descriptor, packet)


def open_tap(namespace: str, device: str) -> int:
    """The end of a tap that exists in a namespace."""
    enter(namespace)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", device.encode(), TAP_WITHOUT_HEADER))
    return descriptor


def enter(namespace: str) -> None:
    """Make a network namespace this thread's own; os.setns needs Python 3.12."""
    with (Path("/run/netns") / namespace).open("rb") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter namespace {namespace}")


if __name__ == "__main__":
    main()
