"""The search's own bookkeeping equals the traffic model's count."""

from dataclasses import replace

import numpy as np
import pytest

from placement.plan import PlacementPlan, Strategy
from placement.search.anneal import anneal
from placement.search.caps import Caps, steered
from placement.search.outlook import fit_outlook
from placement.search.pace import Pace
from placement.search.pairs import exchange_ranks, fill_pull
from placement.search.replicas import fill_spare_slots
from placement.search.solve import Search
from placement.search.start import anneal_pairs, make_pairs
from placement.search.state import (
    hosts_of,
    make_flow,
    make_layout,
    make_machine,
    make_tokens,
    token_order,
)
from placement.search.walk import total_cost
from placement.strategies import PlacementOptions, get_strategy
from placement.timing import rows_by_kind, unit_of
from placement.topology import Topology
from placement.trace import RoutingTrace
from placement.traffic import count_traffic, crossing_rate, imbalance_of
from planted import foretelling, planted_trace, random_trace

TOPOLOGIES = [(1, 4, None), (2, 2, None), (2, 2, 2), (2, 4, 4), (4, 1, 1), (3, 2, None)]


def random_hosts(trace, width, extra, seed):
    rng = np.random.default_rng(seed)
    hosts = np.zeros((trace.num_layers, trace.num_experts, width), dtype=bool)
    for layer in hosts:
        layer[np.arange(trace.num_experts), rng.permutation(trace.num_experts) % width] = True
        layer[rng.integers(0, trace.num_experts, extra), rng.integers(0, width, extra)] = True
    return hosts


def plan_of(hosts, trace, topology):
    return PlacementPlan.from_hosts(
        hosts,
        topology=topology,
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(name="test"),
    )


def with_outlook(plan, outlook):
    return replace(plan, outlook=tuple(tuple(map(tuple, layer)) for layer in outlook.tolist()))


def caps(cap):
    return Caps(rank=cap, node=cap, mean=cap)


def search_on(trace, topology, *, extra=0, slots=None, domain=None, seed=0, parts=0, **fields):
    hosts = random_hosts(trace, topology.num_ranks, extra, seed)
    slots = slots or int(hosts.sum(axis=1).max())
    layout = make_layout(hosts, slots_per_rank=slots)
    return Search(
        tokens=make_tokens(trace, num_ranks=topology.num_ranks, seed=seed, parts=parts),
        machine=make_machine(topology, domain=domain, intra=1.0, inter=1.0),
        layout=layout,
        origin=layout.hosts.copy(),
        sequence=np.zeros(trace.num_tokens, dtype=np.int64),
        seed=seed,
        replicas=slots * topology.num_ranks > trace.num_experts,
        **fields,
    )


@pytest.mark.parametrize("is_foretold", [False, True])
@pytest.mark.parametrize("extra", [0, 6])
@pytest.mark.parametrize(("nodes", "per_node", "domain"), TOPOLOGIES)
def test_the_search_counts_rows_and_load_as_the_traffic_model_does(
    nodes, per_node, domain, extra, is_foretold
):
    trace = planted_trace(tokens=300, experts=12, top_k=3, topics=3)
    if is_foretold:
        trace = foretelling(trace)
    topology = Topology(num_nodes=nodes, ranks_per_node=per_node)
    hosts = random_hosts(trace, topology.num_ranks, extra, seed=1)
    traffic = count_traffic(trace, plan_of(hosts, trace, topology), coherence_domain=domain)
    tokens = make_tokens(trace, num_ranks=topology.num_ranks, seed=0)
    layout = make_layout(hosts, slots_per_rank=12)
    for intra, expected in ((1.0, "total"), (0.0, "inter_node_dedup")):
        machine = make_machine(topology, domain=domain, intra=intra, inter=1.0)
        flow = make_flow(tokens, machine, layout)
        rows = total_cost(tokens, flow) / trace.num_tokens
        assert rows == pytest.approx(traffic.rows_per_token()[expected], abs=1e-9)
        assert (flow.load == traffic.load).all()
    assert (hosts_of(layout, trace.num_experts) == hosts).all()


@pytest.mark.parametrize("extra", [0, 6])
@pytest.mark.parametrize("backend", ["deepep-v2", "nccl-ep", "deepep-ll"])
def test_the_search_prices_the_rows_of_each_backend(backend, extra):
    trace = planted_trace(tokens=300, experts=12, top_k=3, topics=3)
    topology = Topology(num_nodes=2, ranks_per_node=3)
    hosts = random_hosts(trace, topology.num_ranks, extra, seed=1)
    plan = plan_of(hosts, trace, topology)
    rows = rows_by_kind(trace, plan, backend=backend, protocol="home")
    tokens = make_tokens(trace, num_ranks=topology.num_ranks, seed=0)
    prices = {"intra": 0.25, "inter": 1.0}
    machine = make_machine(topology, domain=1, unit=unit_of(backend), **prices)
    flow = make_flow(tokens, machine, make_layout(hosts, slots_per_rank=12))
    expected = sum(rows[kind] * price for kind, price in prices.items())
    assert total_cost(tokens, flow) / trace.num_tokens == pytest.approx(expected)


@pytest.mark.parametrize("is_foretold", [False, True])
@pytest.mark.parametrize("extra", [0, 6])
@pytest.mark.parametrize(("nodes", "per_node", "domain"), TOPOLOGIES)
def test_the_search_follows_an_outlook_as_the_traffic_model_does(
    nodes, per_node, domain, extra, is_foretold
):
    trace = planted_trace(tokens=300, experts=12, top_k=3, topics=3)
    if is_foretold:
        trace = foretelling(trace)
    topology = Topology(num_nodes=nodes, ranks_per_node=per_node)
    hosts = random_hosts(trace, topology.num_ranks, extra, seed=1)
    shape = (trace.num_layers, trace.num_experts, topology.num_ranks)
    outlook = np.random.default_rng(0).integers(0, 9, shape).astype(np.int32)
    plan = with_outlook(plan_of(hosts, trace, topology), outlook)
    traffic = count_traffic(trace, plan, coherence_domain=domain)
    tokens = make_tokens(trace, num_ranks=topology.num_ranks, seed=0)
    machine = make_machine(topology, domain=domain, intra=1.0, inter=1.0)
    machine = machine._replace(outlook=outlook)
    flow = make_flow(tokens, machine, make_layout(hosts, slots_per_rank=12))
    rows = total_cost(tokens, flow) / trace.num_tokens
    assert rows == pytest.approx(traffic.rows_per_token()["total"], abs=1e-9)
    assert (flow.load == traffic.load).all()


def test_a_fitted_outlook_saves_rows_on_tokens_not_seen():
    trace = planted_trace(tokens=4000, experts=12, top_k=3, topics=4, noise=0.3)
    fit, held_out = trace.split()
    topology = Topology(num_nodes=1, ranks_per_node=4)
    hosts = random_hosts(trace, 4, 0, seed=1)
    machine = make_machine(topology, domain=None, intra=1.0, inter=1.0)
    tokens = make_tokens(fit, num_ranks=4, seed=0)
    outlook = fit_outlook(tokens, machine, make_layout(hosts, slots_per_rank=12), visits=1e7)
    plan = plan_of(hosts, trace, topology)
    without = count_traffic(held_out, plan).rows_per_token()
    ahead = count_traffic(held_out, with_outlook(plan, outlook)).rows_per_token()
    assert ahead["total"] < 0.99 * without["total"]


@pytest.mark.parametrize("is_foretold", [False, True])
@pytest.mark.parametrize("extra", [0, 6])
@pytest.mark.parametrize(("nodes", "per_node", "domain"), TOPOLOGIES)
def test_annealing_keeps_its_books_true(nodes, per_node, domain, extra, is_foretold):
    trace = planted_trace(tokens=300, experts=12, top_k=3, topics=3)
    if is_foretold:
        trace = foretelling(trace)
    topology = Topology(num_nodes=nodes, ranks_per_node=per_node)
    search = search_on(trace, topology, extra=extra, domain=domain, parts=3)
    problem = search.problem(1 << 40, caps(1.5), 7)
    assert anneal(problem, 300, 20.0) > 0
    fresh = make_flow(search.tokens, search.machine, search.layout)
    for name in ("owner", "choice", "load", "part_load"):
        assert (getattr(problem.flow, name) == getattr(fresh, name)).all(), name
    assert problem.flow.part_load.shape == (trace.num_layers, 3, topology.num_ranks)
    assert problem.flow.part_load.sum(axis=1) == pytest.approx(problem.flow.load)
    assert problem.flow.cost == pytest.approx(fresh.cost)
    plan_of(hosts_of(search.layout, trace.num_experts), trace, topology)


def test_a_high_price_of_excess_load_keeps_the_cap():
    trace = planted_trace(tokens=800, experts=16, top_k=2, topics=4)
    search = search_on(trace, Topology(num_nodes=1, ranks_per_node=4))
    problem = search.problem(1 << 40, caps(1.15), 3)
    problem.limits.price[:] = (0.0, 50.0)
    for heat in (30.0, 10.0, 3.0):
        anneal(problem, 2000, heat)
    load = problem.flow.load
    assert (load.max(axis=1) <= 1.15 * load.mean(axis=1)).all()


def test_a_price_of_uneven_load_makes_it_more_even_below_the_cap():
    trace = planted_trace(tokens=1600, experts=16, top_k=2, topics=8, noise=0.6)
    uses = np.where((trace.expert_ids < 4).any(axis=(1, 2)), 1, 4)  # some experts have more load
    trace = trace.select(np.repeat(np.arange(1600), uses))
    mean = {}
    for price in (0.0, 1.0):
        runs = []
        for seed in range(4):
            search = search_on(trace, Topology(num_nodes=1, ranks_per_node=4))
            problem = search.problem(1 << 40, Caps(rank=9.0, node=9.0, mean=1.0), seed)
            problem.limits.price[:] = (price, 50.0)
            for heat in (30.0, 10.0, 3.0):
                anneal(problem, 2000, heat)
            runs.append(imbalance_of(problem.flow.load).mean())
        mean[price] = np.mean(runs)
    assert mean[1.0] < mean[0.0] - 0.02


def test_the_price_of_uneven_load_follows_what_is_wanted():
    load = np.array([[12.0, 8.0], [11.0, 9.0]])
    assert steered(2.0, load, 1.15, 1.0) == pytest.approx(2.0)
    assert steered(2.0, load, 1.10, 1.0) == pytest.approx(3.0)
    assert steered(2.0, load, 1.30, 1.0) == pytest.approx(1.0)
    assert steered(2.0, load, 1.0, 1.0) == 4.0
    assert steered(2.0, load, np.inf, 1.0) == 0.0


def test_a_budget_of_moves_is_kept():
    trace = planted_trace(experts=16)
    search = search_on(trace, Topology(num_nodes=1, ranks_per_node=4), max_moves=6)
    anneal(search.problem(1 << 40, caps(9.0), 3), 3000, 10.0)
    moved = int(np.bitwise_count(search.layout.hosts & ~search.origin).sum())
    assert 0 < moved <= 6


def test_spread_copies_are_on_different_nodes():
    trace = planted_trace(experts=8)
    topology = Topology(num_nodes=2, ranks_per_node=2)
    search = search_on(trace, topology, slots=4, spread=True)
    anneal(search.problem(1 << 40, caps(9.0), 3), 3000, 10.0)
    hosts = hosts_of(search.layout, 8)
    by_node = hosts.reshape(trace.num_layers, 8, 2, 2).sum(axis=3)
    assert hosts.sum() > trace.num_layers * 8
    assert by_node.max() == 1


def test_pair_annealing_finds_the_planted_groups_of_a_top1_path():
    trace = planted_trace(experts=16, top_k=1, noise=0.0, tokens=2000)
    topology = Topology(num_nodes=1, ranks_per_node=4)
    machine = make_machine(topology, domain=None, intra=1.0, inter=1.0)
    tokens = make_tokens(trace, num_ranks=4, seed=0)
    rank_of = anneal_pairs(tokens, machine, num_experts=16, caps=caps(9.0), seed=0, pace=Pace())
    hosts = rank_of[:, :, None] == np.arange(4)
    assert hosts.sum(axis=1).max() == 4
    assert crossing_rate(trace, plan_of(hosts, trace, topology)) == 0.0


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 4), (2, 2)])
def test_exchanging_ranks_over_layers_joins_groups_and_keeps_the_books(nodes, per_node):
    trace = planted_trace(tokens=2000, experts=8, top_k=1, topics=8, noise=0.0)
    topology = Topology(num_nodes=nodes, ranks_per_node=per_node)
    machine = make_machine(topology, domain=None, intra=0.5, inter=1.0)
    tokens = make_tokens(trace, num_ranks=4, seed=0)
    unbound = Caps(rank=np.inf, node=np.inf, mean=np.inf)
    pairs = make_pairs(tokens, machine, trace.num_experts, unbound)
    pairs.rank_of[3:] = (pairs.rank_of[3:] + 1) % 4
    fill_pull(pairs)
    rng = np.array([7], dtype=np.uint64)
    before = pairs.rank_of.copy()
    assert exchange_ranks(pairs, rng, 300, 1.0) > 0
    assert (pairs.rank_of != before).any()
    if nodes > 1:
        assert (pairs.rank_of // 2 == before // 2).all()
    again = pairs._replace(
        rank_pull=np.zeros_like(pairs.rank_pull), node_pull=np.zeros_like(pairs.node_pull)
    )
    fill_pull(again)
    assert np.allclose(pairs.rank_pull, again.rank_pull, atol=1e-2)
    assert np.allclose(pairs.node_pull, again.node_pull, atol=1e-2)


def test_a_search_repeats_itself():
    trace = random_trace(experts=8, top_k=2, tokens=200)
    layouts = []
    for _ in range(2):
        search = search_on(trace, Topology(num_nodes=1, ranks_per_node=4))
        anneal(search.problem(1 << 40, caps(9.0), 3), 500, 5.0)
        layouts.append(search.layout.slots.copy())
    assert (layouts[0] == layouts[1]).all()


def test_spare_slots_are_all_filled_and_the_flow_stays_true():
    trace = planted_trace(tokens=400, experts=8, top_k=2, topics=4)
    search = search_on(trace, Topology(num_nodes=1, ranks_per_node=4), slots=4)
    problem = search.problem(1 << 40, caps(9.0), 0)
    before = problem.flow.cost.sum()
    fill_spare_slots(problem)
    assert (search.layout.slots >= 0).all()
    fresh = make_flow(search.tokens, search.machine, search.layout)
    assert (fresh.load == problem.flow.load).all()
    assert problem.flow.cost == pytest.approx(fresh.cost)
    assert fresh.cost.sum() < before, "copies of a random layout save rows"


def test_a_sequence_belongs_to_one_part():
    trace = planted_trace(tokens=300, sequences=12)
    tokens = make_tokens(trace, num_ranks=4, seed=2, parts=4)
    sequence = trace.sequence_ids[token_order(trace, seed=2)]
    pairs = set(zip(sequence.tolist(), tokens.part.tolist(), strict=True))
    assert len(pairs) == len(set(sequence.tolist()))
    assert sorted(np.bincount([part for _, part in pairs])) == [3, 3, 3, 3]
    assert set(make_tokens(trace, num_ranks=4, seed=2).part.tolist()) == {-1}


def test_what_is_even_part_by_part_is_more_even_on_other_sequences():
    topology = Topology(num_nodes=1, ranks_per_node=4)
    found = {0: [], 8: []}
    for seed in range(6):
        trace = trace_of_topics(seed)
        fit, held_out = trace.split()
        for parts, imbalances in found.items():
            search = search_on(fit, topology, parts=parts)
            problem = search.problem(1 << 40, Caps(rank=9.0, node=9.0, mean=1.0), 1)
            problem.limits.price[:] = (10.0, 0.0)
            for heat in (30.0, 10.0, 3.0, 1.0):
                anneal(problem, 3000, heat)
            plan = plan_of(hosts_of(search.layout, 16), trace, topology)
            imbalances.append(count_traffic(held_out, plan).imbalance()["mean"])
    assert np.mean(found[8]) < np.mean(found[0]) - 0.02


def trace_of_topics(seed):
    """Sequences about one topic each, whose two experts like to be together."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(8, size=64)[np.repeat(np.arange(64), 50)]
    experts = 2 * topic[:, None, None] + rng.permuted(np.tile(np.arange(2), (3200, 3, 1)), axis=2)
    return RoutingTrace(
        expert_ids=experts.astype(np.int16),
        sequence_ids=np.repeat(np.arange(64), 50).astype(np.int32),
        num_experts=16,
        model="topics",
        layer_ids=(0, 1, 2),
    )


def test_a_plan_for_home_does_not_depend_on_what_is_foretold():
    trace = planted_trace(tokens=300, experts=8, top_k=2, topics=4)
    options = PlacementOptions(effort=0.2, protocol="home")
    topology = Topology(num_nodes=1, ranks_per_node=4)
    plans = [
        get_strategy("affinity")(t, topology, options=options) for t in (trace, foretelling(trace))
    ]
    assert plans[0] == plans[1]
