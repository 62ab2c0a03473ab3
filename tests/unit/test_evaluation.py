"""Evaluation: held-out tables, intervals, the null and the domain shift."""

from dataclasses import replace

import numpy as np
import pytest

from placement.domains import (
    compare_weights,
    domain_shift,
    domains_of,
    even_weights,
    fair_weights,
    gain_of,
)
from placement.evaluation import (
    bootstrap_change,
    compare_strategies,
    evaluate_null,
    format_table,
    measure,
)
from placement.merging import merge_traces
from placement.strategies import PlacementOptions, get_strategy
from placement.topology import Topology
from placement.traffic import count_traffic
from planted import planted_trace

FOUR = Topology(num_nodes=1, ranks_per_node=4)
QUICK = PlacementOptions(effort=0.2, time_limit=5.0)


@pytest.fixture(scope="module")
def trace():
    return planted_trace(experts=16, top_k=2, tokens=2000, sequences=40)


def test_the_table_starts_with_linear_at_home_and_ends_with_affinity(trace):
    rows = compare_strategies(
        trace, FOUR, ["linear", "balanced", "affinity"], slots_per_rank=None, options=QUICK
    )
    names = [row["plan"] for row in rows]
    assert names == ["linear, home", "linear, coherent", "balanced, coherent", "affinity, coherent"]
    totals = [row["rows_per_token"]["total"] for row in rows]
    assert totals[-1] == min(totals)
    assert format_table(rows).count("\n") == 4


def test_a_strategy_that_finds_no_plan_says_so_in_the_table(trace):
    options = replace(QUICK, max_imbalance=1.0)
    rows = compare_strategies(
        trace, FOUR, ["linear", "affinity"], slots_per_rank=None, options=options
    )
    assert "max / mean load" in format_table(rows)


def test_figures_carry_bytes_where_a_row_has_a_size(trace):
    plan = get_strategy("linear")(trace, FOUR)
    figures = measure(trace, plan, row_bytes=10, kv_bytes=3)
    assert figures["kv_bytes_per_token"] == 3 * 4 * 3
    rows = figures["rows_per_token"]["total"]
    assert figures["bytes_per_token"] == pytest.approx(10 * rows + 36)
    assert measure(trace, plan, protocol="home", kv_bytes=3)["kv_bytes_per_token"] == 0


def test_the_interval_holds_the_change(trace):
    plans = [get_strategy(name)(trace, FOUR, options=QUICK) for name in ("linear", "affinity")]
    change = bootstrap_change(trace, *(count_traffic(trace, plan) for plan in plans))
    assert change["low"] <= change["change"] <= change["high"] < 0


def test_a_change_from_no_rows_is_none_or_endless_and_never_nan():
    expert_ids = np.zeros((40, 2, 1), dtype=np.int16)
    expert_ids[0, 1] = 3  # the one token that moves
    trace = replace(planted_trace(layers=2, experts=4, tokens=40), expert_ids=expert_ids)
    trace = replace(trace, sequence_ids=np.arange(40, dtype=np.int32))
    linear = count_traffic(trace, get_strategy("linear")(trace, FOUR))
    still = replace(linear, rows_of_token=np.zeros_like(linear.rows_of_token))
    assert bootstrap_change(trace, linear, still) == {"change": -1.0, "low": -1.0, "high": -1.0}
    assert bootstrap_change(trace, still, still) == {"change": 0.0, "low": 0.0, "high": 0.0}
    assert bootstrap_change(trace, still, linear)["change"] == np.inf


def test_domains_may_share_sequences(trace):
    domain = (np.arange(trace.num_tokens) % 2).astype(np.uint8)
    shift = domain_shift(replace(trace, domain_ids=domain, domains=("a", "b")), FOUR, options=QUICK)
    assert set(shift["kept"]) == {"a", "b", "all"}


def test_the_null_gains_nothing(trace):
    change = evaluate_null(trace, FOUR, options=replace(QUICK, effort=1.0))
    assert abs(change["change"]) < 0.05


def test_a_plan_for_all_domains_keeps_most_of_each_gain():
    trace = planted_trace(experts=16, top_k=2, tokens=2000, sequences=40)
    domain = (trace.sequence_ids % 2).astype(np.uint8)
    trace = replace(trace, domain_ids=domain, domains=("a", "b"))
    shift = domain_shift(trace, FOUR, options=QUICK)
    assert shift["domains"] == ["a", "b"]
    assert set(shift["kept"]) == {"a", "b", "all"}
    assert min(shift["kept"]["all"].values()) > 0.85


def test_groups_get_the_same_total_weight():
    group = (np.arange(400) < 100).astype(np.int64)
    weights = even_weights(group)
    assert weights[group == 0].sum() == pytest.approx(weights[group == 1].sum())
    assert weights.sum() == pytest.approx(400)


def test_weights_of_domains_are_compared_and_of_one_domain_are_alike():
    parts = [
        planted_trace(experts=16, top_k=2, tokens=1200, sequences=count, seed=seed, topics=8)
        for seed, count in ((1, 40), (2, 2))
    ]
    trace = merge_traces(parts)
    domain = np.repeat([0, 1], [1200, 1200]).astype(np.uint8)
    mixed = compare_weights(
        replace(trace, domain_ids=domain, domains=("many", "few")), FOUR, options=QUICK
    )
    assert mixed["even"] != mixed["none"]
    assert all(row["rows"] > 0 and row["imbalance"] >= 1 for row in mixed.values())
    alone = compare_weights(trace, FOUR, options=QUICK)
    assert alone["even"] == alone["none"]


def test_domains_are_counted_without_gaps():
    trace = planted_trace(tokens=60)
    assert (domains_of(trace) == 0).all()
    ids = np.repeat([3, 7], 30).astype(np.uint8)
    names = tuple("abcdefgh")
    assert domains_of(replace(trace, domain_ids=ids, domains=names)).tolist() == [0] * 30 + [1] * 30


def test_fair_weights_help_the_group_that_would_lose_most():
    parts = [
        planted_trace(experts=16, top_k=2, tokens=t, sequences=20, seed=seed, topics=8)
        for seed, t in ((1, 3000), (2, 600))
    ]
    trace = merge_traces(parts)
    group = np.repeat([0, 1], [3000, 600])
    weights = fair_weights(trace, group, FOUR, options=QUICK)
    assert weights.mean() == pytest.approx(1.0, abs=1e-3)
    linear = get_strategy("linear")(trace, FOUR)
    least = []
    for w in (None, weights):
        plan = get_strategy("affinity")(trace, FOUR, options=replace(QUICK, token_weights=w))
        least.append(min(gain_of(part, linear, plan) for part in parts))
    assert least[1] > 1.1 * least[0]
