"""`exflow links` on four ranks: the same figures on all, in the planner's format."""

from pathlib import Path

import pytest
import torch

import exflow.links
from exflow.links import LinksError, fit, format_table, measure, measure_links, to_links
from exflow.runtime.errors import RankFailureError
from exflow.runtime.ranks import Ranks
from harness import run_ranks
from placement.output import OutputError
from placement.timing import Links

pytestmark = pytest.mark.distributed


def measure_two_nodes():
    """Four ranks, taken for two nodes of two; up to 8 KiB a rank."""
    exflow.links.LARGEST = 1 << 13
    rank = Ranks.from_environment().rank
    ranks = Ranks(rank=rank, num_ranks=4, local_rank=rank % 2, ranks_per_node=2)
    return measure(ranks, torch.device("cpu"))


def test_every_rank_has_the_same_figures_of_both_kinds_of_link():
    first, *others = run_ranks(4, measure_two_nodes)
    assert list(first) == ["intra", "inter"]
    for kind, receivers in (("intra", 1), ("inter", 2)):
        sizes = [size for size, _ in first[kind].points]
        assert sizes == [receivers * 64 * 4**step for step in range(4)]
        assert all(seconds > 0 for _, seconds in first[kind].points)
        assert all(fits[kind].points == first[kind].points for fits in others)
    table = format_table(first)
    assert "inside nodes" in table
    assert "between nodes" in table
    assert "8 KiB" in table


def measure_one_node(output):
    exflow.links.LARGEST = 1 << 8
    return measure_links(output)


def test_what_is_written_is_for_the_planner(tmp_path):
    fits, _ = run_ranks(2, measure_one_node, tmp_path / "links.json")
    links = Links.load(tmp_path / "links.json")
    assert links.intra_latency == fits["intra"].latency
    assert links.intra_bandwidth == fits["intra"].bandwidth
    assert links.inter_bandwidth == Links().inter_bandwidth, "not measured on one node"
    assert "inter" not in fits
    assert to_links(fits).keys() == {"intra_latency", "intra_bandwidth"}


def refused(output):
    exflow.links.measure = None  # never called
    with pytest.raises((OutputError, RankFailureError)) as error:
        measure_links(output)
    return str(error.value)


def test_a_result_that_has_no_place_is_refused_on_every_rank_before_anything_is_measured(tmp_path):
    for message in run_ranks(2, refused, tmp_path):
        assert "cannot be written" in message


def measure_uneven(local_ranks, per_node):
    """As torchrun tells it where nodes have not as many ranks each."""
    rank = Ranks.from_environment().rank
    ranks = Ranks(
        rank=rank,
        num_ranks=len(local_ranks),
        local_rank=local_ranks[rank],
        ranks_per_node=per_node[rank],
    )
    with pytest.raises(LinksError) as error:
        measure(ranks, torch.device("cpu"))
    return str(error.value)


@pytest.mark.parametrize(
    ("local_ranks", "per_node"), [([0, 1, 0], [3, 3, 3]), ([0, 1, 2, 0], [4, 4, 4, 1])]
)
def test_nodes_that_are_not_alike_are_refused_on_every_rank(local_ranks, per_node):
    for message in run_ranks(len(local_ranks), measure_uneven, local_ranks, per_node):
        assert f"{len(local_ranks)} ranks on 2 nodes" in message


def test_a_timeout_must_be_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LinksError, match="--timeout"):
        measure_links(timeout=0)


def test_one_rank_has_no_links(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(LinksError, match="torchrun"):
        measure_links(Path("links.json"))


def test_bursts_and_lost_packets_weigh_little():
    # 1 ms and 1 MB/s; a burst of 4 KB passes at once, a packet of the longest is lost.
    points = [(size, 1e-3 + (size / 1e6 if size > 4096 else 0)) for size in (64, 256, 1024, 4096)]
    points += [(size, 1e-3 + size / 1e6) for size in (16384, 65536, 262144)] + [(1 << 20, 3.0)]
    found = fit(points)
    assert found.latency == pytest.approx(1e-3)
    assert found.bandwidth == pytest.approx(1e6, rel=0.05)
    assert found.miss > 0.5


def test_links_too_fast_to_see_a_bandwidth_still_have_one():
    found = fit([(64, 1e-3), (256, 1e-3), (1024, 1e-3), (4096, 1e-3)])
    assert found.bandwidth > 1e9
