"""Where tokens start: the experts foretold for them, in every family, and the ranks of those."""

import numpy as np
import pytest
import torch

import gpt_moe
from exflow.models.checkpoint import Checkpoint
from exflow.models.families import define_model
from exflow.models.foretelling import begin_token
from exflow.profiling.checkpoint import load_model
from exflow.profiling.passes import foretell as profiler_foretells
from exflow.profiling.recorder import RoutingRecorder
from exflow.runtime.attention import Rotary
from exflow.runtime.decoder import Decoder
from exflow.runtime.opening import Opening, foretell
from exflow.runtime.ranks import Ranks
from exflow.runtime.tables import PlacementTables
from exflow.runtime.weights import load_weights
from harness import run_ranks
from placement.compiled_rules import CompiledRules
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology
from tiny_checkpoints import FAMILIES, qwen3_moe

CPU = torch.device("cpu")
IN_TRANSFORMERS = sorted(FAMILIES.keys() - {"gpt-top1"})


def load(folder):
    definition = define_model(folder)
    no_experts = [()] * len(definition.moe_layer_ids)
    weights = load_weights(
        Checkpoint(folder), definition, no_experts, dtype=torch.float32, device=CPU
    )
    return Decoder(definition, weights), Rotary(definition, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_runtime_and_profiler_foretell_the_same(family, tmp_path, monkeypatch):
    save, changes = FAMILIES[family]
    folder = save(tmp_path / "tiny", **changes)
    decoder, rotary = load(folder)
    token_ids = np.arange(len(decoder.weights.embedding))
    monkeypatch.setattr("exflow.runtime.opening.TOKENS_AT_ONCE", 50)
    found = foretell(decoder, rotary, torch.from_numpy(token_ids))
    model = load_model(str(folder), device="cpu", dtype="float32")
    with RoutingRecorder(model) as recorder:
        expected = profiler_foretells(model, recorder, token_ids)
    assert (found.numpy() == expected).all(axis=1).mean() > 0.99, "but for ties"
    assert len(np.unique(expected)) > 2


def test_the_family_with_learned_positions_and_every_other_layer_dense(tmp_path):
    folder = gpt_moe.save(tmp_path / "tiny", bos_token_id=5)
    decoder, rotary = load(folder)
    assert decoder.definition.moe_layer_ids[0] == 1
    model, chosen = gpt_moe.load(folder), []
    gate = model.transformer.h[1].mlp.gate
    gate.register_forward_hook(lambda module, args, output: chosen.append(output))
    tokens = torch.arange(128)
    with torch.inference_mode():
        model(torch.stack([torch.full_like(tokens, 5), tokens], dim=1))
    expected = chosen[0].view(128, 2, -1)[:, 1].argmax(dim=1)
    assert (foretell(decoder, rotary, tokens)[:, 0] == expected).float().mean() > 0.99


def test_the_token_before_a_text_is_its_beginning_or_the_end_of_another():
    cases = [(7, (3, 4), 7), (None, (3, 4), 3), (None, (), 0), (50256, (60000, 9), 9)]
    for bos, eos, expected in cases:
        assert begin_token(bos, eos, 128) == expected


def make_opening(
    decoder, rotary, ranks, rank_of_expert, num_nodes=1, domain=None, is_prepared=True
):
    definition, num_ranks = decoder.definition, max(rank_of_expert) + 1
    plan = PlacementPlan.from_rank_of_expert(
        np.tile(rank_of_expert, (len(definition.moe_layer_ids), 1)),
        model=definition.name,
        layer_ids=definition.moe_layer_ids,
        topology=Topology(num_nodes=num_nodes, ranks_per_node=num_ranks // num_nodes),
        strategy=Strategy(name="test"),
    )
    tables = PlacementTables.from_plan(
        plan, ranks.rank, top_k=definition.top_k, coherence_domain=domain, device=CPU
    )
    opening = Opening(decoder, rotary, tables, ranks)
    if is_prepared:
        opening.prepare()
    return opening


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_token_starts_with_the_experts_foretold_for_it_in_its_domain(
    tmp_path, monkeypatch, is_compiled
):
    monkeypatch.setattr(CompiledRules, "can_have", lambda num_ranks: is_compiled)
    decoder, rotary = load(qwen3_moe(tmp_path / "tiny", num_experts_per_tok=1))
    rank_of_expert = np.arange(decoder.definition.num_experts) % 4
    tokens, homes = np.array([7, 7, 7, 7, 100, 31, 2, 55]), [0, 1, 2, 3, 0, 1, 2, 3]
    for domain in (None, 2, 1):
        opening = make_opening(decoder, rotary, Ranks(), rank_of_expert, 2, domain)
        wanted = rank_of_expert[opening.foretold(tokens)[:, 0]]
        size = domain or 4
        expected = [
            rank if rank // size == home // size else home
            for rank, home in zip(wanted.tolist(), homes, strict=True)
        ]
        assert opening.owners(tokens.tolist(), homes) == expected


def test_where_the_gate_does_not_tell_tokens_apart_they_start_at_home(tmp_path):
    decoder, rotary = load(qwen3_moe(tmp_path / "tiny", num_experts_per_tok=1))
    decoder.weights.layers[0].router.weight.zero_()  # every gate is tied: one expert for all
    rank_of_expert = np.arange(decoder.definition.num_experts) % 4
    opening = make_opening(decoder, rotary, Ranks(), rank_of_expert, is_prepared=False)
    assert opening.foretold(np.array([1, 2])) is None, "as prepared"
    opening.prepare()
    assert opening.foretold(np.array([1, 2])) is None
    assert opening.owners([1, 2, 3], [3, 0, 2]) == [3, 0, 2]


def test_some_tokens_are_foretold_as_the_whole_vocabulary_is(tmp_path):
    decoder, rotary = load(qwen3_moe(tmp_path / "tiny"))
    rank_of_expert = np.arange(decoder.definition.num_experts) % 2
    opening = make_opening(decoder, rotary, Ranks(), rank_of_expert, is_prepared=False)
    tokens = np.array([9, 3, 9, 100])
    alone = opening.foretold(tokens)
    opening.prepare()
    assert np.array_equal(alone, opening.foretold(tokens))


@pytest.mark.distributed
def test_shares_of_the_vocabulary_are_put_together(tmp_path):
    folder = qwen3_moe(tmp_path / "tiny", num_experts_per_tok=2)
    found = run_ranks(3, prepared_table, folder)
    decoder, rotary = load(folder)
    expected = foretell(decoder, rotary, torch.arange(len(decoder.weights.embedding))).numpy()
    assert len(expected) % 3, "shares differ in size"
    for table in found:
        assert np.array_equal(table, found[0])
        assert (table == expected).all(axis=1).mean() > 0.99, "but for ties"


def prepared_table(folder):
    decoder, rotary = load(folder)
    rank_of_expert = np.arange(decoder.definition.num_experts) % 3
    opening = make_opening(decoder, rotary, Ranks.from_environment(), rank_of_expert)
    return opening.foretold(np.arange(len(decoder.weights.embedding)))
