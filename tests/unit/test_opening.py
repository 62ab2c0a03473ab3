"""Where tokens start: the experts foretold for them, in every family, and the ranks of those."""

import numpy as np
import pytest
import torch

from exflow.models.checkpoint import Checkpoint
from exflow.models.families import define_model
from exflow.profiling.checkpoint import load_model
from exflow.profiling.passes import foretell as profiler_foretells
from exflow.profiling.recorder import RoutingRecorder
from exflow.runtime.attention import Rotary
from exflow.runtime.decoder import Decoder
from exflow.runtime.opening import Opening, foretell
from exflow.runtime.ranks import Ranks
from exflow.runtime.weights import load_weights
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology
from tiny_checkpoints import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)

CPU = torch.device("cpu")
FAMILIES = {
    "mixtral": mixtral,
    "qwen2-moe": qwen2_moe,
    "qwen3-moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": deepseek_v3,
    "gpt-oss": gpt_oss,
}


def load(folder):
    definition = define_model(folder)
    no_experts = [()] * len(definition.moe_layer_ids)
    weights = load_weights(
        Checkpoint(folder), definition, no_experts, dtype=torch.float32, device=CPU
    )
    return Decoder(definition, weights), Rotary(definition, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_runtime_and_profiler_foretell_the_same(family, tmp_path, monkeypatch):
    folder = FAMILIES[family](tmp_path / "tiny")
    decoder, rotary = load(folder)
    token_ids = np.arange(len(decoder.weights.embedding))
    monkeypatch.setattr("exflow.runtime.opening.TOKENS_AT_ONCE", 50)
    found = foretell(decoder, rotary, torch.from_numpy(token_ids))
    model = load_model(str(folder), device="cpu", dtype="float32")
    with RoutingRecorder(model) as recorder:
        expected = profiler_foretells(model, recorder, token_ids)
    assert (found.numpy() == expected).all(axis=1).mean() > 0.99, "but for ties"
    assert len(np.unique(expected)) > 2


def test_a_token_starts_with_the_experts_foretold_for_it_in_its_domain(tmp_path):
    decoder, rotary = load(qwen3_moe(tmp_path / "tiny", num_experts_per_tok=1))
    definition = decoder.definition
    rank_of_expert = np.arange(definition.num_experts) % 4
    plan = PlacementPlan.from_rank_of_expert(
        np.tile(rank_of_expert, (len(definition.moe_layer_ids), 1)),
        model=definition.name,
        layer_ids=definition.moe_layer_ids,
        topology=Topology(num_nodes=2, ranks_per_node=2),
        strategy=Strategy(name="test"),
    )
    tokens, homes = [7, 7, 7, 7, 100, 31, 2, 55], [0, 1, 2, 3, 0, 1, 2, 3]
    for domain in (None, 2, 1):
        opening = Opening(decoder, rotary, plan, Ranks(), coherence_domain=domain)
        opening.prepare()
        wanted = rank_of_expert[opening.foretold(tokens)[:, 0]]
        size = domain or 4
        expected = [
            rank if rank // size == home // size else home
            for rank, home in zip(wanted.tolist(), homes, strict=True)
        ]
        assert opening.owners(tokens, homes) == expected
