"""Experts and gates: the fast forms against plain loops, and known answers."""

import pytest
import torch
from torch.nn import functional

from exflow.models.parts import Activation, Router
from exflow.runtime.expert_weights import ExpertWeights
from exflow.runtime.experts import run_all, run_chosen, run_dense
from exflow.runtime.router import route
from exflow.runtime.weights import RouterWeights

HIDDEN, WIDTH, SLOTS = 16, 8, 4
ACTIVATIONS = [
    Activation(),
    Activation(kind="clamped_silu", alpha=1.702, limit=0.5, has_bias=True),
    Activation(kind="gelu", has_bias=True),
    Activation(kind="gelu_tanh"),
]


def make_experts(activation, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    inner = activation.num_inner * WIDTH
    gate_up, bias = random(SLOTS, inner, HIDDEN), random(SLOTS, inner)
    parts = gate_up.view(SLOTS, activation.num_inner, WIDTH, HIDDEN)
    return ExpertWeights(
        gate_up=gate_up.transpose(1, 2),
        down=random(SLOTS, WIDTH, HIDDEN),
        activation=activation,
        gate_up_bias=bias if activation.has_bias else None,
        down_bias=random(SLOTS, HIDDEN) if activation.has_bias else None,
        joined=parts.permute(3, 1, 0, 2).flatten(1),
        joined_bias=bias.view(SLOTS, -1, WIDTH).transpose(0, 1).flatten()
        if activation.has_bias
        else None,
    )


def one_expert(experts, slot, row):
    """What an expert makes of one row, written out."""
    activation = experts.activation
    inner = row @ experts.gate_up[slot]
    if experts.gate_up_bias is not None:
        inner = inner + experts.gate_up_bias[slot]
    if activation.kind == "gelu":
        inner = functional.gelu(inner)
    elif activation.kind == "gelu_tanh":
        inner = functional.gelu(inner, approximate="tanh")
    else:
        gate, up = inner[:WIDTH], inner[WIDTH:]
        if activation.kind == "silu":
            inner = functional.silu(gate) * up
        else:
            gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
            inner = (up + 1) * gate * torch.sigmoid(gate * 1.702)
    out = inner @ experts.down[slot]
    return out if experts.down_bias is None else out + experts.down_bias[slot]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
def test_joined_and_grouped_products_are_what_each_expert_makes_of_its_rows(activation):
    experts = make_experts(activation)
    rows = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    slots = torch.tensor([[0, 3], [2, -1], [-1, -1], [1, 2], [3, 0]])
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(5, HIDDEN)
    for row, (chosen, shares) in enumerate(zip(slots.tolist(), weights, strict=True)):
        for slot, share in zip(chosen, shares, strict=True):
            if slot >= 0:
                expected[row] += share * one_expert(experts, slot, rows[row])
    joined = run_all(experts, experts.joined, rows, slots, weights)
    grouped = run_chosen(experts, rows, slots, weights)
    assert torch.allclose(joined, expected, atol=1e-5)
    assert torch.allclose(grouped, expected, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
def test_both_forms_keep_bfloat16(activation):
    experts = make_experts(activation, torch.bfloat16)
    rows = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    slots, weights = torch.tensor([[0], [3], [-1]]), torch.rand(3, 1)
    joined = run_all(experts, experts.joined, rows, slots, weights)
    grouped = run_chosen(experts, rows, slots, weights)
    assert joined.dtype == grouped.dtype == run_dense(experts, rows).dtype == torch.bfloat16
    assert torch.allclose(joined.float(), grouped.float(), atol=0.2, rtol=0.05)


def choose(router, logits, top_k, **weights):
    """The gate on logits themselves: an identity for its weights."""
    given = {"bias": None, "correction": None} | weights
    gate = RouterWeights(weight=torch.eye(len(logits)), **given)
    ids, shares = route(router, gate, torch.tensor([logits]), top_k)
    return ids[0].tolist(), shares[0].tolist()


def test_softmax_over_all_experts_or_over_the_chosen_ones():
    logits = [0.0, 2.0, 1.0, -1.0]
    ids, shares = choose(Router(), logits, 2)
    assert ids == [1, 2]
    assert shares == pytest.approx(torch.tensor(logits).softmax(0)[[1, 2]].tolist())
    _, shares = choose(Router(score="softmax_chosen"), logits, 2)
    assert shares == pytest.approx(torch.tensor([2.0, 1.0]).softmax(0).tolist())
    _, shares = choose(Router(is_normalized=True, scale=3.0), logits, 2)
    assert sum(shares) == pytest.approx(3.0)


def test_a_bias_counts_for_logits_and_a_correction_for_the_choice_only():
    router = Router(score="sigmoid", has_correction=True)
    correction = torch.tensor([0.0, 0.0, 1.0, 0.0])
    ids, shares = choose(router, [0.0, 2.0, -1.0, 1.0], 2, correction=correction)
    assert ids == [1, 2]
    assert shares == pytest.approx(torch.tensor([2.0, -1.0]).sigmoid().tolist())
    ids, _ = choose(Router(has_bias=True), [0.0, 2.0], 1, bias=torch.tensor([3.0, 0.0]))
    assert ids == [0]


@pytest.mark.parametrize(("score", "expected"), [("best", [0, 1]), ("best_two", [2, 3])])
def test_experts_come_from_the_best_groups_only(score, expected):
    """Group (0, 1) has the best expert, group (2, 3) the best two."""
    router = Router(num_groups=2, top_groups=1, group_score=score)
    assert choose(router, [1.0, -9.0, 0.9, 0.8], 2)[0] == expected


def test_no_tokens_choose_no_experts():
    router = Router(num_groups=2, top_groups=1)
    gate = RouterWeights(weight=torch.eye(4), bias=None, correction=None)
    ids, shares = route(router, gate, torch.zeros(0, 4), 2)
    assert ids.shape == shares.shape == (0, 2)
