"""Measure the links between the ranks of this job, as the planner's time model takes them.

All ranks send at once, to every rank of their node and then to every rank of the other nodes, as
dispatch does; messages grow until they take long. A phase of b bytes a rank is modelled as

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

if TYPE_CHECKING:
    from pathlib import Path

    import torch.distributed as dist

SMALLEST = 1 << 6
LARGEST = 1 << 26
GROWTH = 4
ENOUGH = 0.25  # seconds of one exchange, after which none is longer
LONG = 0.02  # seconds, from which on fewer repeats do
REPEATS = {"short": 20, "long": 5}
WARM_UP = 3
SHORTEST = 3  # points that tell the latency
SEVERAL = 4  # times the latency: long enough to tell the bandwidth


class LinksError(UserError):
    """Nothing to measure, or no place for the result."""


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
    place = torch.device(choose_device(device, ranks.local_rank))
    with ranks.connected(place, timeout=timeout) as liveness, liveness.naming():
        with ranks.agreeing(place):
            if ranks.is_first and output is not None:
                _check(output)
        fits = measure(ranks, place)
    if ranks.is_first and output is not None:
        output.write_text(json.dumps(to_links(fits), indent=1) + "\n", encoding="utf-8")
    return fits


def measure(ranks: Ranks, device: torch.device) -> dict[str, Fit]:
    """Measure on ranks that are connected."""
    per_node, num_ranks = ranks.ranks_per_node, ranks.num_ranks
    first = ranks.rank - ranks.rank % per_node
    fits = {}
    if per_node > 1:
        group = None if per_node == num_ranks else ranks.node_group(num_ranks // per_node)
        sends = [first + place != ranks.rank for place in range(per_node)]
        fits["intra"] = fit(_time_sizes(ranks, device, sends, group))
    if per_node < num_ranks:
        sends = [not first <= other < first + per_node for other in range(num_ranks)]
        fits["inter"] = fit(_time_sizes(ranks, device, sends, None))
    return fits


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


def _check(output: Path) -> None:
    if not output.parent.is_dir():
        msg = f"{output}: there is no folder {output.parent}; make it, or name another file"
        raise LinksError(msg)


def _time_sizes(
    ranks: Ranks, device: torch.device, sends: list[bool], group: dist.ProcessGroup | None
) -> list[tuple[int, float]]:
    """Exchanges of growing size with the ranks that this one sends to."""
    points: list[tuple[int, float]] = []
    each = SMALLEST
    while each <= LARGEST and (not points or points[-1][1] < ENOUGH):
        is_long = bool(points) and points[-1][1] > LONG
        repeats = REPEATS["long" if is_long else "short"]
        seconds = _time_exchange(device, each, sends, group, repeats)
        points.append((each * sum(sends), max(ranks.gather(seconds, device))))
        each *= GROWTH
    return points


def _time_exchange(
    device: torch.device,
    each: int,
    sends: list[bool],
    group: dist.ProcessGroup | None,
    repeats: int,
) -> float:
    """The median time of exchanges, one right after the other."""
    sizes = [each * wanted for wanted in sends]
    sent = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    times: list[float] = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        all_to_all(received, sent, sizes, sizes, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])
