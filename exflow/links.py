"""Measure the links between the ranks of this job, as the planner's time model takes them.

All ranks send at once, to every rank of their node and then to every rank of the other nodes, by the
exchange that brings partial sums back; messages grow until they take long. A phase of b bytes a
rank is modelled as

    seconds = latency + b / bandwidth

(Hockney, 1994), and its time is that of the slowest rank.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exflow.profiling.checkpoint import choose_device
from exflow.runtime.collectives import all_to_all
from exflow.runtime.ranks import Ranks
from placement.errors import UserError
from placement.output import check_writable, replacing

if TYPE_CHECKING:
    from pathlib import Path

    import torch.distributed as dist

SMALLEST = 1 << 6
LARGEST = 1 << 26  # bytes of a rank in one exchange
GROWTH = 4
ENOUGH = 0.25  # seconds of one exchange, after which none is longer
LONG = 0.02  # seconds, from which on fewer repeats do
REPEATS = {"short": 20, "long": 5}
WARM_UP = 3
SHORTEST = 3  # points that tell the latency
SEVERAL = 4  # times the latency: long enough to tell the bandwidth


class LinksError(UserError):
    """Nothing to measure, or nodes that are not alike."""


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Whom this rank exchanges messages with.

    Attributes:
        sends: by rank of the group, whether messages go there.
        place: this rank's place in the group.
        group: None for all ranks.
    """

    sends: list[bool]
    place: int
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How long exchanges take.

    Attributes:
        latency: seconds.
        bandwidth: bytes a second, of a rank.
        points: (bytes of a rank, seconds) measured.
        miss: the largest relative error of the model at these points; where links let bursts pass,
            at middle sizes it is large.
    """

    latency: float
    bandwidth: float
    points: tuple[tuple[int, float], ...]
    miss: float


def measure_links(
    output: Path | None = None, *, device: str = "auto", timeout: float = 600.0
) -> dict[str, Fit]:
    """Measure on this process's rank; all ranks of the job do the same.

    Args:
        output: where rank 0 writes JSON that `placement.timing.Links.load` reads.
        device: "auto", "cpu", "cuda" or "cuda:N".
        timeout: seconds that a rank waits for another.

    Returns:
        "intra", if nodes have several ranks, and "inter", if there are several nodes.

    Raises:
        UserError: on every rank, if any of them cannot go on.
    """
    ranks = Ranks.from_environment()
    if ranks.num_ranks == 1:
        msg = "one rank has no links: start `exflow links` with torchrun, on the nodes to measure"
        raise LinksError(msg)
    if not timeout > 0:
        msg = f"--timeout must be above 0 seconds, got {timeout}"
        raise LinksError(msg)
    computes_on = torch.device(choose_device(device, ranks.local_rank))
    with ranks.connected(computes_on, timeout=timeout) as liveness, liveness.naming():
        with ranks.agreeing(computes_on):
            if ranks.is_first and output is not None:
                check_writable(output)
        fits = measure(ranks, computes_on)
    if ranks.is_first and output is not None:
        with replacing(output) as partial:
            partial.write_text(json.dumps(to_links(fits), indent=1) + "\n", encoding="utf-8")
    return fits


def measure(ranks: Ranks, device: torch.device) -> dict[str, Fit]:
    """Measure on ranks that are connected.

    Raises:
        LinksError: on every rank, if nodes have not as many ranks each.
    """
    per_node, num_ranks = ranks.ranks_per_node, ranks.num_ranks
    _check_nodes(ranks.gather([ranks.local_rank, per_node], device))
    local_rank = ranks.rank % per_node
    first = ranks.rank - local_rank
    fits = {}
    if per_node > 1:
        group = None if per_node == num_ranks else ranks.node_group(num_ranks // per_node)
        inside = Peers(
            sends=[other != local_rank for other in range(per_node)], place=local_rank, group=group
        )
        fits["intra"] = fit(_time_sizes(ranks, device, inside))
    if per_node < num_ranks:
        sends = [not first <= other < first + per_node for other in range(num_ranks)]
        fits["inter"] = fit(_time_sizes(ranks, device, Peers(sends=sends, place=ranks.rank)))
    return fits


def _check_nodes(of_rank: list[list[int]]) -> None:
    """(local rank, ranks of a node) of every rank, as its launcher said."""
    num_nodes = sum(local_rank == 0 for local_rank, _ in of_rank)
    if any(per_node * num_nodes != len(of_rank) for _, per_node in of_rank):
        msg = (
            f"{len(of_rank)} ranks on {num_nodes} nodes, not as many on each: start it with the same "
            "--nproc-per-node everywhere, as a plan needs"
        )
        raise LinksError(msg)


def fit(points: list[tuple[int, float]]) -> Fit:
    """The model for exchanges of growing size.

    The latency is the median of the shortest; the bandwidth the median of those that take several
    times as long, so that bursts and a lost packet weigh little.

    >>> found = fit([(1, 3e-3), (10, 3e-3), (100, 3e-3), (10**5, 103e-3), (10**6, 1.003)])
    >>> round(found.latency, 6), round(found.bandwidth)
    (0.003, 1000000)
    """
    latency = statistics.median(seconds for _, seconds in points[:SHORTEST])
    long = [(size, seconds) for size, seconds in points if seconds > SEVERAL * latency]
    pace = statistics.median((seconds - latency) / size for size, seconds in long or points[-1:])
    pace = max(pace, sys.float_info.epsilon)
    miss = max(abs((latency + pace * size) / seconds - 1) for size, seconds in points)
    return Fit(latency=latency, bandwidth=1 / pace, points=tuple(points), miss=miss)


def to_links(fits: dict[str, Fit]) -> dict[str, float]:
    """The fields of `placement.timing.Links` that were measured."""
    return {
        f"{kind}_{name}": getattr(found, name)
        for kind, found in fits.items()
        for name in ("latency", "bandwidth")
    }


def format_table(fits: dict[str, Fit]) -> str:
    """What was measured, as lines of text."""
    names = {"intra": "inside nodes", "inter": "between nodes"}
    lines = [f"{'':14}{'latency us':>12}{'MB/s a rank':>13}{'fit within':>12}   measured"]
    for kind, found in fits.items():
        points = ", ".join(
            f"{_size(size)} {1e6 * seconds:.0f} us" for size, seconds in found.points
        )
        lines.append(
            f"{names[kind]:14}{1e6 * found.latency:12.1f}{found.bandwidth / 1e6:13.2f}"
            f"{100 * found.miss:11.0f}%   {points}"
        )
    return "\n".join(lines)


def to_line(fits: dict[str, Fit]) -> str:
    """One line of JSON."""
    return json.dumps({"links": to_links(fits), **{k: vars(found) for k, found in fits.items()}})


def _size(num_bytes: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.4g} {name}"
    return f"{num_bytes} B"


def _time_sizes(ranks: Ranks, device: torch.device, peers: Peers) -> list[tuple[int, float]]:
    """Exchanges of growing size: bytes of a rank, and seconds."""
    points: list[tuple[int, float]] = []
    num_bytes = SMALLEST * sum(peers.sends)
    while num_bytes <= LARGEST and (not points or points[-1][1] < ENOUGH):
        is_long = bool(points) and points[-1][1] > LONG
        repeats = REPEATS["long" if is_long else "short"]
        each = num_bytes // sum(peers.sends)
        seconds = _time_exchange(device, each, peers, repeats)
        points.append((num_bytes, max(ranks.gather(seconds, device))))
        num_bytes *= GROWTH
    return points


def _time_exchange(device: torch.device, each: int, peers: Peers, repeats: int) -> float:
    """The median time of exchanges, one right after the other."""
    sizes = [each * wanted for wanted in peers.sends]
    sent = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    times: list[float] = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        all_to_all(received, sent, sizes, sizes, place=peers.place, group=peers.group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])
