"""Exchanges between CPU ranks: two of a group swap, more use gloo's all-to-all; all get the same."""

import itertools

import pytest
import torch
import torch.distributed as dist

from exflow.runtime.collectives import all_to_all
from exflow.runtime.ranks import Ranks
from harness import run_ranks

pytestmark = pytest.mark.distributed


def exchange(counts, num_nodes):
    """counts[source][destination] rows inside every node, each row (source, destination)."""
    ranks = Ranks.from_environment()
    group = ranks.node_group(num_nodes) if num_nodes > 1 else None
    size = ranks.num_ranks // num_nodes
    place = ranks.rank % size
    sent = [[place, other] for other in range(size) for _ in range(counts[place][other])]
    sizes = [counts[other][place] for other in range(size)]
    received = torch.full((sum(sizes), 2), -1)
    sent = torch.tensor(sent, dtype=torch.int64).view(-1, 2)
    used = []
    whole, dist.all_to_all_single = (
        dist.all_to_all_single,
        lambda *a, **k: used.append(whole(*a, **k)),
    )
    for _ in range(3):
        all_to_all(received, sent, sizes, counts[place], place=place, group=group)
    dist.all_to_all_single = whole
    return received.tolist(), len(used)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_two_ranks_swap_whatever_one_has_for_the_other(num_nodes):
    for there, back in itertools.product((0, 3), repeat=2):
        counts = [[1, there], [back, 2]]
        for rank, (rows, whole) in enumerate(run_ranks(2 * num_nodes, exchange, counts, num_nodes)):
            place = rank % 2
            assert rows == [[s, place] for s in range(2) for _ in range(counts[s][place])]
            assert whole == 0


def test_more_ranks_use_one_collective():
    counts = [[source + destination for destination in range(3)] for source in range(3)]
    for rank, (rows, whole) in enumerate(run_ranks(3, exchange, counts, 1)):
        assert rows == [[source, rank] for source in range(3) for _ in range(counts[source][rank])]
        assert whole == 3
