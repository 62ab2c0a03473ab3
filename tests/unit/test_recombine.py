"""The best layers of several layouts, put together."""

from threading import Event

import numpy as np
import pytest

from placement.search import generations
from placement.search.recombine import cheapest, recombine, rename, weigh
from placement.search.state import hosts_of, make_flow, make_layout, make_machine, make_tokens
from placement.search.walk import total_cost
from placement.strategies import PlacementOptions, get_strategy
from placement.topology import Topology
from placement.traffic import count_traffic
from planted import foretelling, planted_trace, random_trace

ANY = float("inf")


def hosts_at_random(trace, width, seed):
    rng = np.random.default_rng(seed)
    ranks = np.arange(trace.num_experts) % width
    return np.stack(
        [rng.permutation(ranks)[:, None] == np.arange(width) for _ in range(trace.num_layers)]
    )


def layout_of(hosts):
    return make_layout(hosts, slots_per_rank=hosts.shape[1])


def cost_of(tokens, machine, layout):
    return total_cost(tokens, make_flow(tokens, machine, layout)) / tokens.weight.sum()


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 4), (2, 2)])
def test_good_layers_of_two_layouts_are_joined_whatever_their_ranks_are_called(nodes, per_node):
    trace = planted_trace(layers=6, experts=12, top_k=3, topics=4, noise=0.0)
    topology = Topology(num_nodes=nodes, ranks_per_node=per_node)
    good = get_strategy("affinity")(trace, topology).hosts()
    first, last = hosts_at_random(trace, 4, seed=1), hosts_at_random(trace, 4, seed=2)
    first[:3] = good[:3]
    last[3:] = good[3:, :, [2, 3, 1, 0]]  # the nodes, and the ranks of one, have other names
    tokens = make_tokens(trace, num_ranks=4, seed=0)
    machine = make_machine(topology, domain=None, intra=0.11, inter=1.0)
    layouts = [layout_of(hosts) for hosts in (first, last)]
    flows = [make_flow(tokens, machine, layout) for layout in layouts]
    joined = recombine(tokens, machine, layouts, flows, ANY)
    assert cost_of(tokens, machine, joined) == pytest.approx(
        cost_of(tokens, machine, layout_of(good))
    )
    assert cost_of(tokens, machine, layouts[0]) > 2 * cost_of(tokens, machine, joined)


@pytest.mark.parametrize("is_foretold", [False, True])
@pytest.mark.parametrize(("nodes", "per_node"), [(1, 4), (2, 2), (4, 1)])
def test_what_a_chain_is_said_to_cost_is_what_it_costs(nodes, per_node, is_foretold):
    trace = random_trace(tokens=500, layers=5, experts=8)  # one expert a token: owners never tie
    if is_foretold:
        trace = foretelling(trace)
    topology = Topology(num_nodes=nodes, ranks_per_node=per_node)
    tokens = make_tokens(trace, num_ranks=4, seed=0)
    machine = make_machine(topology, domain=None, intra=0.3, inter=1.0)
    layouts = [layout_of(hosts_at_random(trace, 4, seed)) for seed in range(3)]
    flows = [make_flow(tokens, machine, layout) for layout in layouts]
    chains = weigh(tokens, machine, flows)
    path = cheapest(chains, ANY)
    said = chains.cost[path, range(5)].sum()
    said -= sum(chains.saved[layer, path[layer - 1], path[layer]] for layer in range(1, 5))
    joined = recombine(tokens, machine, layouts, flows, ANY)
    owner, node = make_flow(tokens, machine, joined).owner, machine.node_of_rank
    at_start = [(owner[0] == owner[1]).mean(), (node[owner[0]] == node[owner[1]]).mean()]
    cost = cost_of(tokens, machine, joined)
    if not is_foretold:  # a chain is told without what tokens save at home by chance
        said -= machine.row_cost @ at_start
    assert cost == pytest.approx(said)
    assert cost < min(cost_of(tokens, machine, layout) for layout in layouts)


def test_every_expert_keeps_as_many_copies_as_its_layer_had():
    trace = planted_trace(layers=4, experts=12, top_k=3, topics=3)
    topology = Topology(num_nodes=2, ranks_per_node=2)
    tokens = make_tokens(trace, num_ranks=4, seed=0)
    machine = make_machine(topology, domain=None, intra=0.11, inter=1.0)
    plans = [
        get_strategy("affinity")(
            trace, topology, slots_per_rank=4, options=PlacementOptions(seed=s)
        )
        for s in range(2)
    ]
    layouts = [make_layout(plan.hosts(), slots_per_rank=4) for plan in plans]
    flows = [make_flow(tokens, machine, layout) for layout in layouts]
    hosts = hosts_of(recombine(tokens, machine, layouts, flows, ANY), 12)
    for layer, chosen in enumerate(hosts):
        copies = [plan.hosts()[layer].sum(axis=1) for plan in plans]
        assert any((chosen.sum(axis=1) == own).all() for own in copies)


def test_an_even_chain_is_found_where_the_cheapest_is_not_even():
    trace = planted_trace(layers=4, experts=12, top_k=3, topics=3)
    tokens = make_tokens(trace, num_ranks=4, seed=0)
    topology = Topology(num_nodes=1, ranks_per_node=4)
    machine = make_machine(topology, domain=None, intra=1.0, inter=1.0)
    plans = [
        get_strategy(name)(trace, topology, options=PlacementOptions(max_imbalance=cap))
        for name, cap in (("affinity", ANY), ("balanced", None))
    ]
    layouts = [make_layout(plan.hosts(), slots_per_rank=12) for plan in plans]
    chains = weigh(tokens, machine, [make_flow(tokens, machine, layout) for layout in layouts])
    uneven = chains.uneven.mean(axis=1)
    assert uneven[1] < uneven[0]
    middle = float(uneven.mean())
    assert chains.uneven[cheapest(chains, ANY), range(4)].mean() > middle
    assert chains.uneven[cheapest(chains, middle), range(4)].mean() <= middle


def test_ranks_are_renamed_within_nodes_and_nodes_as_a_whole():
    by_rank = np.array([[0, 0, 0, 5], [0, 0, 4, 0], [3, 0, 0, 0], [0, 9, 9, 9.0]])
    worth, names = rename(by_rank, np.zeros((2, 2)))
    assert names.tolist() == [2, 3, 1, 0]
    assert worth == 5 + 4 + 3 + 9


@pytest.mark.parametrize("stops", [1, 3, 6])
def test_interrupted_generations_give_the_cheapest_search_so_far(monkeypatch, stops):
    trace = planted_trace(tokens=400, layers=3, experts=12, top_k=3, topics=4)
    costs, interrupt = [], Event()

    def solve(search, **_):
        costs.append(total_cost(search.tokens, search.flow()) / trace.num_tokens)
        if len(costs) == stops:
            interrupt.set()

    monkeypatch.setattr(generations, "solve", solve)
    options = PlacementOptions(effort=4.0, max_imbalance=ANY, interrupt=interrupt)
    plan = get_strategy("affinity")(trace, Topology(num_nodes=1, ranks_per_node=4), options=options)
    assert len(costs) == stops
    assert plan.strategy.options["hurried"]
    assert plan.predicted["cost_per_token"] == pytest.approx(min(costs), abs=1e-4)


@pytest.mark.parametrize(("nodes", "per_node", "slots"), [(1, 4, 3), (2, 2, 4)])
@pytest.mark.parametrize("is_foretold", [False, True])
def test_generations_cost_no_more_than_one_search_and_are_the_same_twice(
    nodes, per_node, slots, is_foretold
):
    trace = planted_trace(tokens=600, layers=3, experts=12, top_k=3, topics=4, noise=0.4)
    if is_foretold:
        trace = foretelling(trace)
    topology = Topology(num_nodes=nodes, ranks_per_node=per_node)
    costs, plans = [], []
    for effort in (0.5, 4.0, 4.0):
        options = PlacementOptions(effort=effort, max_imbalance=1.3)
        plan = get_strategy("affinity")(trace, topology, slots_per_rank=slots, options=options)
        costs.append(plan.predicted["cost_per_token"])
        plans.append(plan)
        traffic = count_traffic(trace, plan)
        assert traffic.imbalance()["max"] <= 1.3
        if nodes == 1:
            rows = traffic.rows_per_token()["total"]
            assert plan.predicted["cost_per_token"] == pytest.approx(rows, abs=1e-4)
    assert costs[1] <= 1.01 * costs[0]
    assert plans[1].slots == plans[2].slots
