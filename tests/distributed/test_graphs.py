"""Recorded decode steps: what is recorded when, and that nothing but the launching changes.

A recorder that does the work again stands for CUDA's; the real one is tested on a GPU (tests/gpu).
"""

from dataclasses import replace

import pytest
import torch

import exflow.runtime.graphs
import exflow.runtime.steps
from decoding import make_plan, save_model
from exflow.models.checkpoint import Checkpoint
from exflow.runtime.decoder import Decoder
from exflow.runtime.engine import Engine, EngineOptions
from exflow.runtime.metrics import join_phases
from exflow.runtime.ranks import Ranks
from exflow.runtime.requests import Request, SamplingParams
from exflow.runtime.weights import load_weights
from harness import run_ranks
from tiny_checkpoints import make_prompts, qwen3_moe

CPU = torch.device("cpu")
LENGTHS = [5, 17, 1, 30, 8, 3, 9, 60, 2, 4]


class DoAgain:
    """Does recorded work again, and writes where it did at first."""

    def __call__(self, work, counts):
        outputs = work(counts)

        class Recording:
            def replay(self):
                tokens, logits = work(counts.like())
                outputs[0].hidden.copy_(tokens.hidden)
                outputs[1].copy_(logits)

        return Recording(), outputs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(qwen3_moe, tmp_path_factory.mktemp("model"))


def make_engine(model, options, *, is_recorded):
    ranks = Ranks.from_environment()
    plan = make_plan(model.definition, ranks.num_ranks, "linear")
    weights = load_weights(
        Checkpoint(model.folder),
        model.definition,
        [layer[ranks.rank] for layer in plan.slots],
        dtype=torch.float32,
        device=CPU,
    )
    engine = Engine(Decoder(model.definition, weights), plan, ranks, options=options)
    if is_recorded:
        exflow.runtime.steps.CudaRecorder = DoAgain
        engine._steps = replace(engine._steps, can_record=True)
    return engine


def make_requests():
    return [
        Request(index=i, id=i, prompt="", token_ids=tuple(prompt))
        for i, prompt in enumerate(make_prompts(LENGTHS))
    ]


def generate(engine, max_tokens=40):
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return {c.request.index: c.token_ids for c in engine.generate(make_requests(), params)}


@pytest.fixture(autouse=True)
def _restored():
    recorder = exflow.runtime.steps.CudaRecorder
    yield
    exflow.runtime.steps.CudaRecorder = recorder


def test_recorded_steps_give_the_same_tokens(model):
    options = EngineOptions(batch_size=4)
    expected = generate(make_engine(model, options, is_recorded=False))
    engine = make_engine(model, options, is_recorded=True)
    assert generate(engine) == expected
    graphs = engine._cached[1]
    assert graphs.num_recorded > 1
    assert generate(engine) == expected
    assert engine._cached[1] is graphs  # the same cache, so what was recorded is still right


def test_shapes_that_come_seldom_are_not_recorded(model, monkeypatch):
    monkeypatch.setattr(exflow.runtime.graphs, "TIMES_EAGER", 1000)
    engine = make_engine(model, EngineOptions(batch_size=4), is_recorded=True)
    generate(engine, max_tokens=8)
    assert engine._cached[1].num_recorded == 0


def test_no_more_shapes_are_recorded_than_there_is_room_for(model, monkeypatch):
    monkeypatch.setattr(exflow.runtime.graphs, "MAX_RECORDED", 1)
    expected = generate(make_engine(model, EngineOptions(batch_size=4), is_recorded=False))
    engine = make_engine(model, EngineOptions(batch_size=4), is_recorded=True)
    assert generate(engine) == expected
    assert engine._cached[1].num_recorded == 1


def test_another_cache_begins_anew(model):
    engine = make_engine(model, EngineOptions(batch_size=4), is_recorded=True)
    generate(engine)
    cache, graphs = engine._cached
    generate(engine, max_tokens=41 + 16)
    assert engine._cached[0] is not cache
    assert engine._cached[1] is not graphs


def test_without_a_gpu_nothing_is_recorded(model):
    engine = make_engine(model, EngineOptions(batch_size=4), is_recorded=False)
    generate(engine, max_tokens=2)
    assert engine._cached is None


def decode_replicated(model, is_recorded):
    options = EngineOptions(batch_size=6, dispatch="replicated")
    engine = make_engine(model, options, is_recorded=is_recorded)
    tokens = generate(engine)
    cached = engine._cached
    decode = join_phases(Ranks.from_environment().gather(engine.metrics["decode"].to_json(), CPU))
    decode.pop("seconds")
    return tokens, decode, None if cached is None else cached[1].num_recorded


@pytest.mark.distributed
def test_replicated_steps_count_what_they_send_each_time(model):
    tokens, decode, recorded = run_ranks(2, decode_replicated, model, False)[0]
    assert recorded is None
    assert sum(map(sum, decode["rows"]["combine"][0])) > 0
    tokens_again, decode_again, recorded = run_ranks(2, decode_replicated, model, True)[0]
    assert recorded > 0
    assert tokens_again == tokens
    assert decode_again == decode
