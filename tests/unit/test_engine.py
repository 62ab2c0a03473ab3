"""One rank: the engine gives the tokens and logits of transformers."""

import json

import numpy as np
import pytest
import torch

import exflow.runtime.steps
from exflow.models.checkpoint import Checkpoint
from exflow.models.families import define_model
from exflow.runtime.decoder import Decoder
from exflow.runtime.engine import Engine, EngineOptions
from exflow.runtime.ranks import Ranks
from exflow.runtime.recorder import DecodeRecorder
from exflow.runtime.requests import Request, SamplingParams
from exflow.runtime.weights import load_weights
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology
from tiny_checkpoints import decode_with_transformers, make_prompts, olmoe, qwen3_moe

CPU = torch.device("cpu")
PROMPTS = make_prompts([5, 17, 1, 40, 8])
NEW_TOKENS = 12

VARIANTS = {
    "qwen3-top2-with-a-dense-layer": (qwen3_moe, {"mlp_only_layers": [1]}),
    "qwen3-top1": (qwen3_moe, {"num_experts_per_tok": 1}),
    "qwen3-normed-gates-biases-tied": (
        qwen3_moe,
        {
            "norm_topk_prob": True,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        },
    ),
    "qwen3-yarn": (
        qwen3_moe,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "olmoe": (olmoe, {"num_key_value_heads": 2}),
    "olmoe-top4-without-clipping": (olmoe, {"num_experts_per_tok": 4, "clip_qkv": None}),
}


def make_engine(folder, *, batch_size=3, recorder=None):
    definition = define_model(folder)
    plan = PlacementPlan.from_rank_of_expert(
        np.zeros((len(definition.moe_layer_ids), definition.num_experts), dtype=np.int64),
        model=definition.name,
        layer_ids=definition.moe_layer_ids,
        topology=Topology(num_nodes=1, ranks_per_node=1),
        strategy=Strategy(name="linear"),
    )
    slots = [layer[0] for layer in plan.slots]
    weights = load_weights(Checkpoint(folder), definition, slots, dtype=torch.float32, device=CPU)
    options = EngineOptions(batch_size=batch_size)
    return Engine(Decoder(definition, weights), plan, Ranks(), options=options, recorder=recorder)


def make_requests(prompts):
    return [
        Request(index=index, id=index, prompt="", token_ids=tuple(prompt))
        for index, prompt in enumerate(prompts)
    ]


def generate(engine, prompts=PROMPTS, **params):
    params = {"max_tokens": NEW_TOKENS} | params
    completions = engine.generate(make_requests(prompts), SamplingParams(**params))
    tokens = {c.request.index: list(c.token_ids) for c in completions}
    return [tokens[index] for index in range(len(prompts))]


@pytest.fixture
def logits_of(monkeypatch):
    """Logits by (request, position), taken where tokens are sampled."""
    seen = {}
    sample = exflow.runtime.steps.sample

    def sample_and_keep(logits, params, *, request_indices, positions):
        for row, key in enumerate(zip(request_indices.tolist(), positions.tolist(), strict=True)):
            seen[key] = logits[row].clone()
        return sample(logits, params, request_indices=request_indices, positions=positions)

    monkeypatch.setattr(exflow.runtime.steps, "sample", sample_and_keep)
    return seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_logits_equal_those_of_transformers(variant, tmp_path, logits_of):
    save, changes = VARIANTS[variant]
    folder = save(tmp_path / "model", **changes)
    reference = decode_with_transformers(folder, PROMPTS, NEW_TOKENS)
    assert generate(make_engine(folder)) == reference.tokens
    for index, (prompt, expected) in enumerate(zip(PROMPTS, reference.logits, strict=True)):
        found = torch.stack([logits_of[index, len(prompt) + i] for i in range(len(expected))])
        scale = max(1.0, float(expected.abs().max()))
        assert float((found - expected).abs().max()) <= 1e-5 * scale


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return qwen3_moe(tmp_path_factory.mktemp("tiny") / "model", mlp_only_layers=[1])


def test_tokens_do_not_depend_on_what_else_is_in_flight(tiny):
    for params in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}):
        alone = generate(make_engine(tiny, batch_size=1), **params)
        together = generate(make_engine(tiny, batch_size=8), **params)
        assert alone == together


def test_seeds_change_sampled_tokens(tiny):
    first, second = (generate(make_engine(tiny), temperature=1.0, seed=seed) for seed in (0, 1))
    assert first != second


def test_a_text_ends_at_its_end_token(tiny, tmp_path):
    full = generate(make_engine(tiny))
    ending = full[0][3]
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ending}))
    for short, long in zip(generate(make_engine(tmp_path)), full, strict=True):
        end = long.index(ending) + 1 if ending in long else len(long)
        assert short == long[:end]


def test_the_recorded_trace_has_every_decoded_token_once(tiny):
    definition = define_model(tiny)
    recorder = DecodeRecorder(definition)
    engine = make_engine(tiny, recorder=recorder)
    tokens = generate(engine)
    trace = recorder.gather(Ranks(), CPU, source="test", foretell=engine.foretell)
    keys = list(zip(trace.sequence_ids.tolist(), trace.positions.tolist(), strict=True))
    expected = [
        (index, len(PROMPTS[index]) + step)
        for index, made in enumerate(tokens)
        for step in range(len(made) - 1)
    ]
    assert keys == expected
    assert trace.layer_ids == (0, 2)
    assert trace.phase == "decode"
    weights = trace.expert_weights.astype(np.float32)
    assert (weights[:, :, 0] >= weights[:, :, 1]).all()


def test_no_requests_make_no_completions(tiny):
    assert generate(make_engine(tiny), prompts=[]) == []
