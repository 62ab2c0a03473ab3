"""The index arithmetic of dispatch and combine, and the local dispatcher as specification."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exflow.runtime.dispatcher import LocalDispatcher, Tokens
from exflow.runtime.expert_weights import ExpertWeights
from exflow.runtime.experts import run_chosen, run_experts
from exflow.runtime.hops import order_by_rank, ranks_that_run
from exflow.runtime.rows import RowFormat
from exflow.runtime.sharing import Routes, find_relays
from exflow.runtime.tables import PlacementTables
from placement.plan import PlacementPlan, Strategy
from placement.rules import choose_ranks
from placement.topology import Topology

CPU = torch.device("cpu")


def make_plan(slots, num_experts, *, num_nodes=1):
    return PlacementPlan(
        model="m",
        num_experts=num_experts,
        layer_ids=tuple(range(len(slots))),
        topology=Topology(num_nodes=num_nodes, ranks_per_node=len(slots[0]) // num_nodes),
        strategy=Strategy(name="test"),
        slots=slots,
    )


def make_experts(num_slots, hidden=16, size=8, *, is_joined=False):
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(num_slots, hidden, 2 * size, generator=generator)
    joined = torch.cat([part.transpose(0, 1).flatten(1) for part in gate_up.chunk(2, dim=2)], dim=1)
    return ExpertWeights(
        gate_up=gate_up,
        down=torch.randn(num_slots, size, hidden, generator=generator),
        joined=joined if is_joined else None,
    )


def run_one_by_one(experts, hidden, slots, weights):
    """Row by row, choice by choice."""
    out = torch.zeros_like(hidden)
    for row in range(len(hidden)):
        for choice in range(slots.shape[1]):
            slot = int(slots[row, choice])
            if slot >= 0:
                gate, up = (hidden[row] @ experts.gate_up[slot]).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                out[row] += weights[row, choice] * (inner @ experts.down[slot])
    return out


@given(st.data())
def test_rows_are_laid_out_rank_by_rank(data):
    num_rows, num_ranks = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 4))
    wanted = np.array(
        data.draw(
            st.lists(st.booleans(), min_size=num_rows * num_ranks, max_size=num_rows * num_ranks)
        ),
        dtype=bool,
    ).reshape(num_rows, num_ranks)
    rows, counts = order_by_rank(torch.from_numpy(wanted))
    expected = [[r for r in range(num_rows) if wanted[r, rank]] for rank in range(num_ranks)]
    assert rows.tolist() == [row for part in expected for row in part]
    assert counts == [len(part) for part in expected]


def test_ranks_that_run_marks_each_rank_once():
    assert ranks_that_run(torch.tensor([[2, 0, 2]]), 3).tolist() == [[True, False, True]]
    assert ranks_that_run(torch.empty((0, 2), dtype=torch.int64), 3).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_owner", [False, True])
@pytest.mark.parametrize("num_rows", [0, 5])
def test_what_is_packed_into_rows_comes_out(dtype, has_owner, num_rows):
    row_format = RowFormat(hidden_size=6, top_k=3, dtype=dtype, has_owner=has_owner)
    hidden = torch.randn(num_rows, 6).to(dtype)
    choices, weights = torch.randint(0, 9999, (num_rows, 3)), torch.rand(num_rows, 3)
    owners = [torch.randint(0, 9999, (num_rows,)) for _ in range(2)] if has_owner else []
    rows = row_format.pack(hidden, choices, weights, *owners)
    assert rows.shape == (num_rows, row_format.payload_bytes + 4 * (6 + len(owners)))
    assert torch.equal(row_format.hidden(rows), hidden)
    metadata = row_format.metadata(rows)
    assert torch.equal(metadata.choices, choices)
    assert torch.equal(metadata.weights, weights)
    assert metadata.owners.tolist() == [of_token.tolist() for of_token in owners]


def test_tables_choose_as_the_planner_does():
    slots = (
        ((0, 1), (2, 3), (4,), (5,)),
        ((0, 1, 5), (1, 2, 3), (4, 0), (5, 2)),
    )
    plan = make_plan(slots, 6, num_nodes=2)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(50)])
    for rank in range(4):
        tables = PlacementTables.from_plan(plan, rank, top_k=3, coherence_domain=None, device=CPU)
        for layer in range(2):
            hosts = torch.from_numpy(plan.hosts()[layer].astype(np.int64))
            owner = torch.full((50,), rank)
            ranks = choose_ranks(hosts, ids, owner, torch.tensor([0, 0, 1, 1]))
            assert torch.equal(tables.choose(layer, ids), ranks * 6 + ids)
            mine = tables.slot_of_choice[layer][rank * 6 + torch.arange(6)]
            assert [e for e in range(6) if mine[e] >= 0] == sorted(slots[layer][rank])
            assert all(slots[layer][rank][s] == e for e, s in enumerate(mine.tolist()) if s >= 0)


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize(("num_rows", "top_k"), [(0, 2), (1, 1), (7, 3), (40, 2)])
def test_experts_together_equal_experts_one_by_one(num_rows, top_k, is_joined):
    experts = make_experts(5, is_joined=is_joined)
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, 16, generator=generator)
    slots = torch.stack(
        [torch.randperm(7, generator=generator)[:top_k] for _ in range(num_rows)]
        or [torch.empty(top_k, dtype=torch.int64)]
    )[:num_rows]
    slots = torch.where(slots < 5, slots, -1)  # two of seven experts are elsewhere
    weights = torch.rand(num_rows, top_k, generator=generator)
    expected = run_one_by_one(experts, hidden, slots, weights)
    assert torch.allclose(run_experts(experts, hidden, slots, weights), expected, atol=1e-5)


@pytest.mark.parametrize(("num_rows", "top_k"), [(1, 1), (7, 3), (40, 2)])
def test_pairs_whose_expert_is_elsewhere_may_stay_as_on_a_gpu(monkeypatch, num_rows, top_k):
    experts = make_experts(5)
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, 16, generator=generator)
    slots = torch.randint(-1, 5, (num_rows, top_k), generator=generator)
    slots[0] = -1
    weights = torch.rand(num_rows, top_k, generator=generator)
    expected = run_one_by_one(experts, hidden, slots, weights)
    for is_known in (True, False):
        monkeypatch.setattr("exflow.runtime.experts.is_known", lambda _, known=is_known: known)
        assert torch.allclose(run_chosen(experts, hidden, slots, weights), expected, atol=1e-5)


def test_a_rank_without_experts_returns_zeros():
    hidden = torch.randn(3, 16)
    nothing = run_experts(make_experts(0), hidden, torch.full((3, 2), -1), torch.rand(3, 2))
    assert torch.equal(nothing, torch.zeros(3, 16))


def test_the_local_dispatcher_gives_rows_that_are_the_tokens():
    plan = make_plan((((3, 0, 2, 1),),), 4)
    tables = PlacementTables.from_plan(plan, 0, top_k=2, coherence_domain=None, device=CPU)
    dispatcher = LocalDispatcher(tables=tables)
    hidden, slots = torch.randn(3, 8), torch.arange(3)
    tokens = Tokens(hidden=hidden, slots=slots, owned=(3,))
    ids = torch.tensor([[0, 1], [2, 3], [3, 0]])
    rows, record = dispatcher.dispatch(0, tokens, ids, torch.ones(3, 2))
    assert torch.equal(rows.hidden, hidden)
    assert rows.expert_slots.tolist() == [[1, 3], [2, 0], [0, 1]]
    combined = dispatcher.combine(torch.ones(3, 8), record)
    assert torch.equal(combined.hidden, hidden + 1)
    assert torch.equal(combined.slots, slots)


def test_records_stay_inside_the_domain():
    routes = Routes([0, 0, 1, 1])
    pairs = [(a, b) for a in range(4) for b in range(4) if routes.is_direct(a, b)]
    assert pairs == [(0, 1), (1, 0), (2, 3), (3, 2)]
    assert routes.has_domains
    assert not routes.has_hops
    assert not Routes([0, 1, 2, 3]).has_domains


def test_records_cross_to_a_node_once_and_are_passed_on_there():
    """Six ranks, one domain, nodes of three: every rank gets each other's records once."""
    nodes = [0, 0, 0, 1, 1, 1]
    routes = Routes([0] * 6, find_relays([0] * 6, nodes))
    assert routes.has_hops
    for source in range(6):
        crossed = [to for to in range(6) if nodes[to] != nodes[source]]
        assert sum(routes.is_direct(source, to) for to in crossed) == 1
        for to in set(range(6)) - {source}:
            got = [relay for relay in range(6) if source in routes.relayed(relay, to)]
            assert len(got) + routes.is_direct(source, to) == 1
            assert all(nodes[relay] == nodes[to] for relay in got)
    within_nodes = [0, 0, 0, 1, 1, 1]
    assert not Routes(within_nodes, find_relays(within_nodes, nodes)).has_hops
