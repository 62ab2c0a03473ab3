"""Bounds: exact where it can be checked, valid everywhere, tighter than the first relaxation."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from placement.bounds import lower_bound, most_kept, partition_lines, transportation_bound
from placement.exact import layer_layouts, least_rows
from placement.plan import PlacementPlan, Strategy
from placement.strategies import PlacementOptions, get_strategy
from placement.topology import Topology
from placement.traffic import count_traffic
from planted import planted_trace, random_trace


def rows_of(hosts, trace, topology, domain):
    plan = PlacementPlan.from_hosts(
        np.array(hosts),
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(name="test"),
    )
    traffic = count_traffic(trace, plan, coherence_domain=domain)
    return int(traffic.dispatch.sum() + traffic.combine.sum())


def every_layout(experts, ranks, slots):
    for bits in product([False, True], repeat=experts * ranks):
        hosts = np.array(bits).reshape(experts, ranks)
        if hosts.any(axis=1).all() and (hosts.sum(axis=0) <= slots).all():
            yield hosts


@pytest.mark.parametrize("seed", range(200))
def test_the_bound_of_a_small_instance_is_the_best_of_all_its_plans(seed):
    experts, ranks, slots, layers, top_k, domain = [
        (4, 2, 2, 2, 1, None),
        (4, 2, 2, 2, 2, None),
        (3, 3, 1, 2, 1, None),
        (4, 2, 2, 2, 2, 1),
        (3, 2, 2, 1, 2, None),
    ][seed % 5]
    trace = random_trace(tokens=12, layers=layers, experts=experts, top_k=top_k, seed=seed)
    if seed % 3 == 0:
        foretold = random_trace(tokens=12, layers=1, experts=experts, top_k=top_k, seed=seed + 1)
        trace = replace(trace, foretold_ids=foretold.expert_ids[:, 0])
    topology = Topology(num_nodes=1, ranks_per_node=ranks)
    every = list(every_layout(experts, ranks, slots))
    best = min(rows_of(p, trace, topology, domain) for p in product(every, repeat=layers))
    bound = lower_bound(trace, topology, slots_per_rank=slots, coherence_domain=domain)
    assert bound.method == "exact"
    assert bound.rows_per_token * trace.num_tokens == pytest.approx(best)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("extra", [0, 1])
def test_no_plan_goes_below_the_bound(top_k, extra):
    trace = planted_trace(experts=16, top_k=top_k, tokens=500)
    topology = Topology(num_nodes=1, ranks_per_node=4)
    bound = lower_bound(trace, topology, slots_per_rank=4 + extra)
    plan = get_strategy("affinity")(
        trace, topology, slots_per_rank=4 + extra, options=PlacementOptions(max_imbalance=9.0)
    )
    rows = count_traffic(trace, plan).rows_per_token()["total"]
    assert bound.method == ("budget" if extra else "spectral")
    assert bound.rows_per_token <= rows + 1e-9


def test_the_spectral_bound_is_above_the_transportation_bound():
    rng = np.random.default_rng(0)
    counts = rng.random((3, 16, 16)) ** 4
    loose, tight = transportation_bound(counts, 4), most_kept(counts, 4, 4)
    assert (tight < 0.95 * loose).all()


def test_the_spectral_bound_is_exact_for_disjoint_groups():
    counts = np.kron(np.eye(4), np.ones((4, 4)))[None]
    assert most_kept(counts, 4, 4)[0] == pytest.approx(64.0, rel=1e-6)


def test_with_one_slot_a_rank_the_transportation_bound_is_an_assignment():
    counts = np.array([[[3.0, 1.0], [2.0, 5.0]]])
    assert transportation_bound(counts, 1)[0] == pytest.approx(8.0)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_partition_lines_lie_below_every_partition(top_k):
    for label in np.random.default_rng(top_k).integers(0, top_k, (200, top_k)):
        pairs = int((label[:, None] == label).sum() - top_k) // 2
        for alpha, beta in partition_lines(top_k):
            assert len(np.unique(label)) >= alpha - beta * pairs - 1e-9


def test_more_than_the_ranks_can_hold_costs_nothing():
    trace = planted_trace()
    one = Topology(num_nodes=1, ranks_per_node=1)
    assert lower_bound(trace, one, slots_per_rank=8).rows_per_token == 0.0


def test_layer_layouts_are_all_different():
    layouts = layer_layouts(4, 2, 2)
    assert len(layouts) == 6
    assert len(np.unique(layouts, axis=0)) == 6
    assert len(layer_layouts(2, 2, 2)) == 9


def test_tokens_that_keep_to_their_pair_cost_one_row_each_at_most():
    trace = planted_trace(experts=4, topics=4, top_k=1, noise=0.0, layers=3, tokens=100)
    rows = least_rows(trace, Topology(num_nodes=1, ranks_per_node=2), slots_per_rank=2)
    assert 0 < rows <= trace.num_tokens
