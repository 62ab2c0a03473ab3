"""Every strategy makes a whole plan of what it is given; `affinity` finds what was planted."""

import json

import numpy as np
import pytest

from placement.comparison import ComparisonError, compare_plans
from placement.plan import PlacementPlan
from placement.strategies import STRATEGIES, PlacementOptions, StrategyError, get_strategy
from placement.strategies.balanced import balance_layer, pack, replicate
from placement.strategies.exflow_milp import split
from placement.strategies.moetuner import assign_clusters, cluster_experts
from placement.timing import TimingError, rows_by_kind
from placement.topology import Topology
from placement.traffic import count_traffic, crossing_rate
from planted import planted_trace

FOUR = Topology(num_nodes=1, ranks_per_node=4)
TWO_BY_TWO = Topology(num_nodes=2, ranks_per_node=2)
QUICK = PlacementOptions(time_limit=5.0, effort=0.2)


@pytest.fixture(scope="module")
def trace():
    return planted_trace(experts=16, top_k=2, tokens=800)


def place(name, trace, topology, slots=None, **options):
    settings = {"time_limit": 5.0, "effort": 0.2, **options}
    if name == "metis":
        pytest.importorskip("pymetis")
    return get_strategy(name)(
        trace, topology, slots_per_rank=slots, options=PlacementOptions(**settings)
    )


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("topology", [FOUR, TWO_BY_TWO, Topology(num_nodes=1, ranks_per_node=3)])
def test_every_strategy_places_every_expert_within_the_slots(name, topology, trace):
    plan = place(name, trace, topology)
    room = -(-trace.num_experts // topology.num_ranks)
    assert max(len(experts) for ranks in plan.slots for experts in ranks) <= room
    assert plan.strategy.name == name
    assert plan.model == trace.model


@pytest.mark.parametrize("name", ["balanced", "affinity"])
@pytest.mark.parametrize("topology", [FOUR, TWO_BY_TWO])
def test_spare_slots_hold_replicas(name, topology, trace):
    plan = place(name, trace, topology, 5)
    assert max(len(experts) for ranks in plan.slots for experts in ranks) == 5
    assert plan.has_replicas


@pytest.mark.parametrize(
    ("backend", "slots"), [("deepep-v2", 4), ("nccl-ep", 4), ("nccl-ep", 5), ("deepep-ll", 5)]
)
def test_affinity_saves_the_rows_of_a_backend(backend, slots, trace):
    fit, held_out = trace.split()
    chosen, other = (
        place(name, fit, TWO_BY_TWO, slots, protocol="home", backend=backend, effort=1.0)
        for name in ("affinity", "balanced")
    )
    ours, theirs = (
        rows_by_kind(held_out, plan, backend=backend, protocol="home") for plan in (chosen, other)
    )
    assert ours["inter"] < theirs["inter"]
    assert sum(ours.values()) < sum(theirs.values())


def test_where_a_backend_sends_the_same_rows_affinity_says_so(trace):
    with pytest.raises(StrategyError, match=r"agrs .* use --strategy balanced"):
        place("affinity", trace, FOUR, 5, protocol="home", backend="agrs")
    with pytest.raises(StrategyError, match=r"deepep-ll .* more --slots-per-rank"):
        place("affinity", trace, FOUR, 4, protocol="home", backend="deepep-ll")
    with pytest.raises(StrategyError, match=r"deepspeed .* use --strategy balanced$"):
        place("affinity", trace, FOUR, 5, protocol="home", backend="deepspeed")
    with pytest.raises(TimingError, match="brings tokens home"):
        place("affinity", trace, FOUR, 5, backend="nccl-ep")
    with pytest.raises(TimingError, match="unknown backend 'mpi'"):
        place("affinity", trace, FOUR, 5, backend="mpi")
    assert place("balanced", trace, FOUR, 4, protocol="home", backend="agrs").num_ranks == 4


@pytest.mark.parametrize("nodes", [1, 9])
@pytest.mark.parametrize("backend", ["nccl-ep", "deepep-ll"])
def test_more_than_64_ranks_take_a_backend(nodes, backend):
    trace = planted_trace(experts=72, topics=8, top_k=4, tokens=400)
    topology = Topology(num_nodes=nodes, ranks_per_node=72 // nodes)
    plan = place("affinity", trace, topology, 2, protocol="home", backend=backend)
    assert plan.has_replicas
    assert plan.strategy.options["backend"] == backend


@pytest.mark.parametrize("name", ["linear", "random", "balanced", "affinity"])
def test_the_same_seed_writes_the_same_bytes(name, trace, tmp_path):
    for file in ("a.json", "b.json"):
        place(name, trace, FOUR, 5, seed=3, time_limit=None).save(tmp_path / file)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_affinity_brings_planted_groups_together_and_beats_every_baseline():
    trace = planted_trace(experts=16, top_k=2, tokens=2000, noise=0.1)
    rows = {
        name: count_traffic(trace, place(name, trace, FOUR)).rows_per_token()
        for name in STRATEGIES
        if name != "metis"
    }
    best = rows.pop("affinity")["total"]
    assert best < 0.6 * rows["linear"]["total"]
    assert all(best <= other["total"] for other in rows.values()), rows


def test_affinity_keeps_the_cap_it_is_given(trace):
    traffic = count_traffic(trace, place("affinity", trace, FOUR, max_imbalance=1.15, effort=1.0))
    assert traffic.imbalance()["max"] <= 1.15


def test_replicas_save_rows_where_groups_overlap():
    trace = planted_trace(experts=16, top_k=2, tokens=800, noise=0.5)
    rows = [
        count_traffic(trace, place("affinity", trace, FOUR, slots, max_imbalance=1.3))
        for slots in (4, 6)
    ]
    assert rows[1].rows_per_token()["total"] < rows[0].rows_per_token()["total"]


def test_on_two_nodes_affinity_saves_rows_between_nodes(trace):
    plans = [place(name, trace, TWO_BY_TWO) for name in ("linear", "affinity")]
    linear, affinity = (count_traffic(trace, plan).rows_per_token() for plan in plans)
    assert affinity["inter_node_dedup"] < 0.6 * linear["inter_node_dedup"]


def test_more_than_64_ranks_are_placed_by_node():
    trace = planted_trace(experts=64, topics=8, top_k=4, tokens=400)
    topology = Topology(num_nodes=10, ranks_per_node=8)
    plan = place("affinity", trace, topology)
    linear = place("linear", trace, topology)
    rows = [count_traffic(trace, p).rows_per_token()["inter_node_dedup"] for p in (linear, plan)]
    assert rows[1] < 0.8 * rows[0]


def test_a_warm_start_moves_no_more_than_it_may(trace):
    old = place("linear", trace, FOUR)
    new = place("affinity", trace, FOUR, start=old, max_moves=8)
    changes = compare_plans(old, new, expert_bytes=10)
    assert 0 < changes["loaded"] <= 8
    assert changes["bytes"] == 10 * changes["loaded"]
    rows = [count_traffic(trace, plan).rows_per_token()["total"] for plan in (old, new)]
    assert rows[1] < rows[0]


@pytest.mark.parametrize("topology", [FOUR, TWO_BY_TWO])
def test_groups_that_are_kept_only_change_ranks(topology, trace):
    fit, held_out = trace.split()
    old = place("balanced", fit, topology)
    new = place("affinity", fit, topology, start=old, keep_groups=True)
    assert all(
        sorted(map(sorted, before)) == sorted(map(sorted, after))
        for before, after in zip(old.slots, new.slots, strict=True)
    )
    before, after = (count_traffic(held_out, plan) for plan in (old, new))
    assert np.array_equal(np.sort(before.load, axis=1), np.sort(after.load, axis=1))
    assert after.rows_per_token()["total"] < 0.95 * before.rows_per_token()["total"]
    assert new.strategy.options["keep_groups"] is True
    assert "max_imbalance" not in new.strategy.options, "no cap was asked for, and none was kept"


def test_groups_of_a_plan_with_copies_are_kept_too(trace):
    old = place("balanced", trace, FOUR, 5)
    new = place("affinity", trace, FOUR, start=old, keep_groups=True)
    assert new.num_slots == old.num_slots
    rows = [count_traffic(trace, plan).rows_per_token()["total"] for plan in (old, new)]
    assert rows[1] < rows[0]


def test_groups_on_too_many_ranks_are_refused():
    trace = planted_trace(experts=64, topics=8, top_k=4, tokens=40)
    topology = Topology(num_nodes=10, ranks_per_node=8)
    start = place("linear", trace, topology)
    with pytest.raises(StrategyError, match="at most 64 ranks"):
        place("affinity", trace, topology, start=start, keep_groups=True)


def test_plans_for_different_machines_are_not_compared(trace):
    with pytest.raises(ComparisonError, match="num_ranks"):
        compare_plans(
            place("linear", trace, FOUR),
            place("linear", trace, Topology(num_nodes=1, ranks_per_node=2)),
        )


def test_weighted_tokens_pull_the_plan_their_way():
    first, second = (planted_trace(experts=16, noise=0.0, seed=s) for s in (1, 2))
    from placement.merging import merge_traces

    both = merge_traces([first, second])
    rows = []
    for weight in (20.0, 0.05):
        weights = np.repeat(np.array([weight, 1.0], np.float32), [600, 600])
        plan = place("affinity", both, FOUR, token_weights=weights, effort=1.0)
        rows.append(count_traffic(first, plan).rows_per_token()["total"])
    assert rows[0] < rows[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_imbalance": 0.9}, "at least 1"),
        ({"protocol": "away"}, "unknown protocol"),
        ({"effort": 0.0}, "effort"),
        ({"max_moves": 3}, "--from"),
        ({"keep_groups": True}, "--from"),
        ({"max_imbalance": float("nan")}, "at least 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(StrategyError, match=words):
        PlacementOptions(**options)


def test_slots_that_cannot_hold_all_experts_are_refused(trace):
    with pytest.raises(StrategyError, match="--slots-per-rank 4"):
        place("affinity", trace, FOUR, 3)


def test_a_cap_that_no_plan_keeps_is_refused():
    trace = planted_trace(experts=4, topics=4, top_k=1, noise=0.0, tokens=100)
    with pytest.raises(StrategyError, match="max / mean load within 1"):
        place("affinity", trace, FOUR, max_imbalance=1.0)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(StrategyError, match="choose one of linear"):
        get_strategy("best")


def test_replicas_go_to_the_busiest_copies():
    assert replicate(np.array([90.0, 10.0, 10.0, 10.0]), 6, most=3).tolist() == [3, 1, 1, 1]


def test_packs_are_equally_full_and_even():
    packs = pack(np.array([5.0, 4.0, 3.0, 2.0]), np.arange(4), 2, 2)
    assert sorted(map(sorted, packs)) == [[0, 3], [1, 2]]


def test_two_copies_of_an_expert_are_never_on_one_rank():
    hosts = balance_layer(
        np.array([90.0, 10.0, 10.0, 10.0]), Topology(num_nodes=1, ranks_per_node=2), 3
    )
    assert hosts[0].tolist() == [True, True]
    assert hosts.any(axis=1).all()


def test_the_integer_program_keeps_pairs_together():
    weights = np.array([[[0.0, 9.0], [9.0, 0.0]]])
    parts, gap = split(weights, np.array([[0, 1], [0, 1]]), 2, 1, 10.0)
    assert parts[0].tolist() == parts[1].tolist()[::-1]
    assert gap == 0.0


def test_the_integer_program_finds_the_best_top1_plan_of_a_small_instance():
    trace = planted_trace(experts=4, topics=4, top_k=1, noise=0.3, layers=3, tokens=200)
    two = Topology(num_nodes=1, ranks_per_node=2)
    milp, affinity = (
        place(name, trace, two, max_imbalance=9.0, time_limit=20.0)
        for name in ("exflow_milp", "affinity")
    )
    assert milp.predicted["mip_gap"][0] == 0.0
    assert crossing_rate(trace, affinity) == pytest.approx(crossing_rate(trace, milp))


def test_clusters_are_even_and_go_where_their_tokens_are():
    cluster = cluster_experts(np.array([4.0, 3.0, 2.0, 1.0]), 2, 5.0)
    assert cluster[0] == cluster[3]
    assert cluster[1] == cluster[2]
    assert assign_clusters(np.array([[1.0, 9.0], [9.0, 1.0]]), 5.0).tolist() == [1, 0]


def test_a_plan_tells_how_it_was_made(trace, tmp_path):
    place("affinity", trace, FOUR, max_imbalance=1.4, seed=5).save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["strategy"]["seed"] == 5
    assert data["strategy"]["options"]["max_imbalance"] == 1.4
    assert data["predicted"]["imbalance_mean"] <= 1.4
    assert PlacementPlan.load(tmp_path / "plan.json").strategy.name == "affinity"


def test_nodes_may_be_more_than_experts(trace):
    topology = Topology(num_nodes=trace.num_experts + 1, ranks_per_node=2)
    plan = place("balanced", trace, topology)
    assert plan.hosts().any(axis=2).all()
