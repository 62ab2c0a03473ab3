"""The traffic model: known answers, then a slow and obvious count, then NumPy against torch."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.compiled_rules import CompiledRules
from placement.plan import PlacementPlan, Strategy
from placement.rules import choose_ranks, first_owner, next_owner, relays, walk_layers
from placement.timing import rows_by_kind
from placement.topology import Topology
from placement.trace import RoutingTrace
from placement.traffic import TrafficError, count_load, count_traffic, crossing_rate


def make_trace(expert_ids, num_experts, sequence_ids=None):
    expert_ids = np.asarray(expert_ids, dtype=np.int16)
    if sequence_ids is None:
        sequence_ids = np.arange(len(expert_ids))
    return RoutingTrace(
        expert_ids=expert_ids,
        sequence_ids=np.asarray(sequence_ids, dtype=np.int32),
        num_experts=num_experts,
        model="toy",
        layer_ids=tuple(range(expert_ids.shape[1])),
    )


def make_plan(hosts, num_nodes=1):
    return PlacementPlan.from_hosts(
        hosts,
        model="toy",
        layer_ids=tuple(range(len(hosts))),
        topology=Topology(num_nodes=num_nodes, ranks_per_node=hosts.shape[2] // num_nodes),
        strategy=Strategy(name="test"),
    )


def linear_hosts(layers, experts, ranks):
    rank_of_expert = np.arange(experts) * ranks // experts
    return np.tile(rank_of_expert[:, None] == np.arange(ranks), (layers, 1, 1))


def test_a_top1_token_pays_twice_at_home_and_once_per_move_when_coherent():
    # One token of sequence 0 (home: rank 0) uses experts 2, 2, 0 of ranks {0: 0 1, 1: 2 3}.
    trace = make_trace([[[2], [2], [0]]], num_experts=4)
    plan = make_plan(linear_hosts(3, 4, 2))
    home = count_traffic(trace, plan, protocol="home")
    assert home.rows_per_token()["dispatch"] == 2
    assert home.rows_per_token()["combine"] == 2
    coherent = count_traffic(trace, plan, protocol="coherent")
    assert coherent.dispatch[:, 0, 1].tolist() == [1, 0, 0], "it leaves home at the first layer"
    assert coherent.dispatch[:, 1, 0].tolist() == [0, 0, 1], "and moves back at the third"
    assert coherent.combine.sum() == 0, "under top-1 the expert's rank owns the token next"
    assert crossing_rate(trace, plan) == 0.5


def test_a_foretold_token_starts_where_its_first_expert_is():
    # As above; the second token's first expert is foretold wrongly.
    trace = make_trace([[[2], [2], [0]]] * 2, num_experts=4, sequence_ids=[0, 0])
    trace = replace(trace, foretold_ids=np.array([[3], [1]], dtype=np.int16))
    plan = make_plan(linear_hosts(3, 4, 2))
    coherent = count_traffic(trace, plan)
    assert coherent.rows_of_token.tolist() == [1, 2], "the row of the first layer is saved"
    home = count_traffic(trace, plan, protocol="home")
    assert home.rows_of_token.tolist() == [4, 4], "at home nothing moves"
    replicated = count_traffic(trace, plan, dispatch="replicated")
    assert replicated.rows_of_token.tolist() == [6, 6]


def test_a_rank_that_runs_two_experts_gets_one_row():
    # Token of home 0 uses experts 2 and 3, both on rank 1, and then 0 and 2.
    trace = make_trace([[[2, 3], [0, 2]]], num_experts=4)
    plan = make_plan(linear_hosts(2, 4, 2))
    home = count_traffic(trace, plan, protocol="home")
    assert home.rows_per_token()["total"] == 4
    coherent = count_traffic(trace, plan, protocol="coherent")
    assert coherent.dispatch[0].tolist() == [[0, 1], [0, 0]]
    assert coherent.combine[0].sum() == 0, "rank 1 runs both experts and owns the token next"
    assert coherent.dispatch[1].tolist() == [[0, 0], [1, 0]]
    assert coherent.combine[1].tolist() == [[0, 1], [0, 0]], "a tie: the owner, rank 1, stays"
    assert home.load.tolist() == [[0, 2], [1, 1]]
    assert home.imbalance() == {"mean": 1.5, "max": 2.0}


def test_a_row_is_sent_once_to_a_remote_node():
    # 2 nodes x 2 ranks, home rank 0; experts on ranks 2 and 3, both on node 1.
    trace = make_trace([[[2, 3]]], num_experts=4)
    plan = make_plan(linear_hosts(1, 4, 4), num_nodes=2)
    home = count_traffic(trace, plan, protocol="home").rows_per_token()
    assert home["inter_node"] == 4
    assert home["inter_node_dedup"] == 2


def test_a_replica_on_the_owner_is_free():
    hosts = linear_hosts(1, 4, 2)
    hosts[0, 3, 0] = True
    trace = make_trace([[[3]]], num_experts=4)
    assert count_traffic(trace, make_plan(hosts), protocol="home").rows_per_token()["total"] == 0


def test_replicas_follow_the_documented_order():
    node_of_rank = np.array([0, 0, 1, 1])
    hosts = np.zeros((4, 4), dtype=np.int64)
    hosts[0, [1, 2]] = 1  # the owner's node beats a remote one
    hosts[1, 2] = 1
    hosts[2, [1, 3]] = 1  # only the rotation decides when both nodes count the same
    hosts[3, [0, 3]] = 1
    owner = np.array([0])
    assert choose_ranks(hosts, np.array([[0]]), owner, node_of_rank).tolist() == [[1]]
    assert choose_ranks(hosts, np.array([[0, 1]]), owner, node_of_rank).tolist() == [[2, 2]]
    assert choose_ranks(hosts, np.array([[3, 1]]), owner, node_of_rank).tolist() == [[0, 2]]


@st.composite
def routings(draw):
    layers, top_k, experts = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(3, 8)),
    )
    num_nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    tokens, ranks = draw(st.integers(1, 12)), num_nodes * per_node
    ids = rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]
    hosts = rng.random((layers, experts, ranks)) < draw(st.sampled_from([0.0, 0.3]))
    first = rng.integers(0, ranks, (layers, experts))
    np.put_along_axis(hosts, first[:, :, None], values=True, axis=2)
    trace = make_trace(ids, experts, rng.integers(0, 9, tokens))
    if draw(st.booleans()):
        foretold = rng.random((tokens, experts)).argsort(axis=1)[:, :top_k]
        trace = replace(trace, foretold_ids=foretold.astype(np.int16))
    return trace, make_plan(hosts, num_nodes)


def obvious_rank(plan, layer, token_experts, owner):
    """choose_ranks by the letter of its docstring, one token."""
    copies = {e: [r for r, s in enumerate(plan.slots[layer]) if e in s] for e in token_experts}
    node = plan.topology.node_of_rank
    chosen = {copies[e][0] for e in token_experts if len(copies[e]) == 1}
    result = {}
    for e in token_experts:

        def near(rank, e=e):
            is_visited = node[rank] in {node[r] for r in chosen}
            on_owner_node = node[rank] == node[owner]
            turn = (rank - owner - e) % plan.num_ranks
            return (rank != owner, rank not in chosen, not on_owner_node, not is_visited, turn)

        result[e] = min(copies[e], key=near)
        chosen.add(result[e])
    return result


def obvious_move(run, owner, domain):
    """next_owner by the letter of its docstring, one token, without an outlook."""
    mates = [r for r in set(run) if r // domain == owner // domain]
    return min(mates, key=lambda r: (-run.count(r), r != owner, r)) if mates else owner


def obvious_traffic(trace, plan, protocol, domain):
    rows = {"dispatch": 0, "combine": 0, "inter_node": 0, "inter_node_dedup": 0}
    node = plan.topology.node_of_rank
    for number, (token, sequence) in enumerate(
        zip(trace.expert_ids, trace.sequence_ids, strict=True)
    ):
        owner = int(sequence) % plan.num_ranks
        if protocol == "coherent" and trace.foretold_ids is not None:
            foretold = [int(e) for e in trace.foretold_ids[number]]
            run = list(obvious_rank(plan, 0, foretold, owner).values())
            owner = obvious_move(run, owner, domain)
        for layer, experts in enumerate(token):
            ranks = obvious_rank(plan, layer, [int(e) for e in experts], owner)
            run = list(ranks.values())
            following = owner
            if protocol == "coherent":
                following = obvious_move(run, owner, domain)
            for name, end in (("dispatch", owner), ("combine", following)):
                remote = set(run) - {end}
                far = [r for r in remote if node[r] != node[end]]
                rows[name] += len(remote)
                rows["inter_node"] += len(far)
                rows["inter_node_dedup"] += len({node[r] for r in far})
            owner = following
    return rows


@settings(max_examples=150)
@given(routings(), st.sampled_from(["home", "coherent"]), st.data())
def test_the_count_equals_a_slow_and_obvious_one(routing, protocol, data):
    trace, plan = routing
    sizes = [d for d in range(1, plan.num_ranks + 1) if plan.num_ranks % d == 0]
    domain = data.draw(st.sampled_from(sizes))
    traffic = count_traffic(trace, plan, protocol=protocol, coherence_domain=domain)
    expected = obvious_traffic(trace, plan, protocol, domain)
    found = traffic.rows_per_token()
    for name, rows in expected.items():
        assert found[name] * trace.num_tokens == pytest.approx(rows), name
    assert traffic.rows_of_token.sum() == expected["dispatch"] + expected["combine"]
    assert traffic.inter_node_rows_of_token.sum() == expected["inter_node_dedup"]
    assert traffic.load.sum() == trace.expert_ids.size


@given(routings())
def test_a_domain_of_one_rank_is_home(routing):
    trace, plan = routing
    home = count_traffic(trace, plan, protocol="home")
    coherent = count_traffic(trace, plan, protocol="coherent", coherence_domain=1)
    assert np.array_equal(home.dispatch, coherent.dispatch)
    assert np.array_equal(home.combine, coherent.combine)


def test_an_outlook_decides_among_the_ranks_that_run_experts():
    # Ranks 0, 0, 1 run the experts; the outlook prefers rank 2, then 1, then 0.
    ranks, owner, domain = np.array([[0, 0, 1]]), np.array([0]), np.zeros(3, dtype=np.int64)
    assert next_owner(ranks, owner, domain).tolist() == [0], "most experts, without an outlook"
    assert next_owner(ranks, owner, domain, np.array([[1, 2, 9]])).tolist() == [1]
    assert next_owner(ranks, owner, domain, np.array([[2, 2, 9]])).tolist() == [0], "a tie: stays"
    assert next_owner(ranks, np.array([2]), domain, np.array([[2, 2, 9]])).tolist() == [0]
    ends = np.array([[0, 2]])
    assert next_owner(ends, owner, domain, np.array([[1, 0, 2]])).tolist() == [2], "no tie: moves"
    own_domains = np.arange(3)
    assert next_owner(ranks, np.array([2]), own_domains, np.array([[5, 5, 0]])).tolist() == [2]


@given(routings())
def test_torch_tensors_follow_the_same_rules(routing):
    torch = pytest.importorskip("torch")
    trace, plan = routing
    node, domain = plan.topology.node_of_rank, plan.topology.node_of_rank
    owner = trace.sequence_ids.astype(np.int64) % plan.num_ranks
    for layer, hosts in enumerate(plan.hosts().astype(np.int64)):
        experts = trace.expert_ids[:, layer].astype(np.int64)
        ranks = choose_ranks(hosts, experts, owner, node)
        tensors = [torch.tensor(array) for array in (hosts, experts, owner, node)]
        assert np.array_equal(choose_ranks(*tensors).numpy(), ranks)
        moved = next_owner(torch.tensor(ranks), torch.tensor(owner), torch.tensor(domain))
        assert np.array_equal(moved.numpy(), next_owner(ranks, owner, domain))
        ahead = np.random.default_rng(layer).integers(0, 9, (len(owner), plan.num_ranks))
        moved = next_owner(*(torch.tensor(array) for array in (ranks, owner, domain, ahead)))
        assert np.array_equal(moved.numpy(), next_owner(ranks, owner, domain, ahead))


@given(routings(), st.booleans(), st.data())
def test_compiled_rules_say_the_same(routing, has_outlook, data):
    trace, plan = routing
    if has_outlook:
        outlook = np.random.default_rng(0).integers(0, 4, plan.hosts().shape)
        plan = replace(plan, outlook=tuple(tuple(map(tuple, layer)) for layer in outlook.tolist()))
    sizes = [d for d in range(1, plan.num_ranks + 1) if plan.num_ranks % d == 0]
    coherence_domain = data.draw(st.sampled_from([None, *sizes]))
    compiled = CompiledRules(plan, coherence_domain=coherence_domain)
    owner = trace.sequence_ids.astype(np.int64) % plan.num_ranks
    domains = plan.topology.domain_of_rank(coherence_domain)
    foretold = trace.expert_ids[:, 0].astype(np.int64)
    hosts, nodes = plan.hosts()[0].astype(np.int64), plan.topology.node_of_rank
    starts = first_owner(hosts, foretold, owner, nodes, domains)
    assert np.array_equal(compiled.first_owner(foretold, owner), starts)
    steps = walk_layers(
        trace.expert_ids.astype(np.int64),
        owner,
        plan.hosts().astype(np.int64),
        node_of_rank=plan.topology.node_of_rank,
        domain_of_rank=plan.topology.domain_of_rank(coherence_domain),
        outlook=plan.outlook_table(),
    )
    for step in steps:
        experts = trace.expert_ids[:, step.layer].astype(np.int64)
        ranks, next_owners = compiled.route(step.layer, experts, step.owner)
        assert np.array_equal(ranks, step.rank_of_choice)
        assert np.array_equal(next_owners, step.next_owner)


def test_chunks_do_not_change_the_count(monkeypatch):
    rng = np.random.default_rng(0)
    trace = make_trace(rng.random((50, 3, 8)).argsort(axis=2)[:, :, :2], 8)
    plan = make_plan(linear_hosts(3, 8, 4), num_nodes=2)
    whole = count_traffic(trace, plan)
    monkeypatch.setattr("placement.traffic.CHUNK_CELLS", 70)
    parts = count_traffic(trace, plan)
    assert np.array_equal(whole.dispatch, parts.dispatch)
    assert np.array_equal(whole.rows_of_token, parts.rows_of_token)
    assert whole.inter_node_dedup == parts.inter_node_dedup


def test_a_trace_of_another_model_is_refused():
    trace = make_trace([[[0]]], num_experts=4)
    with pytest.raises(TrafficError, match="use a plan made from a trace of the same model"):
        count_traffic(trace, make_plan(linear_hosts(1, 8, 2)))
    plan = make_plan(linear_hosts(1, 4, 2))
    with pytest.raises(TrafficError, match="model is other in the trace, toy in the plan"):
        count_traffic(replace(trace, model="other"), plan)
    with pytest.raises(TrafficError, match="layer_ids is 3 in the trace, 0 in the plan"):
        crossing_rate(replace(trace, layer_ids=(3,)), plan)
    for name in ("hub/toy", "/models/toy", "unknown"):
        count_traffic(replace(trace, model=name), plan)
    with pytest.raises(TrafficError, match="unknown protocol 'away'"):
        count_traffic(trace, make_plan(linear_hosts(1, 4, 2)), protocol="away")


def test_rows_of_loads_alone_are_refused_and_loads_are_counted():
    trace = replace(make_trace([[[0, 1]], [[1, 2]]], num_experts=4), phase="counts")
    plan = make_plan(linear_hosts(1, 4, 2))
    for count in (count_traffic, crossing_rate):
        with pytest.raises(TrafficError, match=r"counting rows needs .* made from loads alone"):
            count(trace, plan)
    for backend in ("exflow", "deepep-ll", "agrs"):
        with pytest.raises(TrafficError, match="made from loads alone"):
            rows_by_kind(trace, plan, backend=backend, protocol="home")
    assert count_load(trace, plan).tolist() == [[3, 1]]


def test_relays_are_the_first_from_the_owner_s_place_upwards():
    """One by one, on three nodes of four ranks."""
    rng = np.random.default_rng(0)
    runs = rng.random((200, 12)) < 0.3
    end = rng.integers(12, size=200)
    found = relays(runs, end, np.arange(12) // 4)
    for token, rank in zip(*np.nonzero(runs), strict=True):
        node, place = rank // 4, end[token] % 4
        order = [4 * node + (place + step) % 4 for step in range(4)]
        first = next(other for other in order if runs[token, other])
        assert found[token, rank] == (rank if node == end[token] // 4 else first)


def test_hierarchical_dispatch_changes_links_and_not_the_number_of_rows():
    """Experts on ranks 2 and 3, the owner is 0: one row crosses, one goes from 2 to 3."""
    trace = RoutingTrace(
        expert_ids=np.array([[[2, 3]]], dtype=np.int16),
        sequence_ids=np.zeros(1, dtype=np.int32),
        num_experts=4,
        model="m",
        layer_ids=(0,),
    )
    plan = PlacementPlan(
        model="m",
        num_experts=4,
        layer_ids=(0,),
        topology=Topology(num_nodes=2, ranks_per_node=2),
        strategy=Strategy(name="test"),
        slots=(((0,), (1,), (2,), (3,)),),
    )
    flat = count_traffic(trace, plan, protocol="home")
    assert list(zip(*np.nonzero(flat.dispatch[0]), strict=True)) == [(0, 2), (0, 3)]
    deep = count_traffic(trace, plan, protocol="home", dispatch="hierarchical")
    assert list(zip(*np.nonzero(deep.dispatch[0]), strict=True)) == [(0, 2), (2, 3)]
    assert list(zip(*np.nonzero(deep.combine[0]), strict=True)) == [(2, 0), (3, 2)]
    assert deep.rows_per_token() == flat.rows_per_token()


def test_replicated_dispatch_sends_partial_sums_from_each_rank_to_each():
    trace = make_trace([[[0, 1]], [[2, 3]], [[0, 3]]], num_experts=4)
    plan = make_plan(linear_hosts(1, 4, 4), num_nodes=2)
    traffic = count_traffic(trace, plan, dispatch="replicated")
    assert traffic.dispatch.sum() == 0
    assert np.array_equal(traffic.combine[0], 3 * (1 - np.eye(4)))
    assert traffic.rows_of_token.tolist() == [12] * 3
    assert traffic.inter_node == 3 * 8
    assert traffic.inter_node_dedup == 3 * 4
    at_home = count_traffic(trace, plan, protocol="home")
    assert np.array_equal(traffic.load, at_home.load)
    for protocol, domain in (("home", None), ("coherent", 2)):
        with pytest.raises(TrafficError, match="all ranks in one domain"):
            count_traffic(
                trace, plan, protocol=protocol, coherence_domain=domain, dispatch="replicated"
            )
