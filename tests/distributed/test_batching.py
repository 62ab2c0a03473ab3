"""Continuous batching: 64 requests join and leave, and each gets the tokens it gets alone."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from decoding import CPU, make_plan
from exflow.models.checkpoint import Checkpoint
from exflow.models.families import define_model
from exflow.runtime.decoder import Decoder
from exflow.runtime.engine import Engine, EngineOptions
from exflow.runtime.kv_budget import KvBudget
from exflow.runtime.kv_cache import PAGE_SIZE
from exflow.runtime.ranks import Ranks
from exflow.runtime.requests import Request, SamplingParams
from exflow.runtime.weights import load_weights
from harness import run_ranks
from tiny_checkpoints import make_prompts, qwen3_moe

pytestmark = pytest.mark.distributed

BUDGET_TOKENS = 10 * PAGE_SIZE
HUGE = 17  # the number of the request that never fits


@dataclass(frozen=True)
class Case:
    """One way to run the requests."""

    num_ranks: int
    options: EngineOptions


def make_requests():
    """Prompts of 1 to 60 tokens, 1 to 12 new ones, greedy and sampled; one is too long."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 60, size=64)
    lengths[HUGE] = 200
    prompts = make_prompts(lengths.tolist(), seed=1)
    return [
        Request(
            index=index,
            id=index,
            prompt="",
            token_ids=tuple(prompt),
            params=SamplingParams(
                max_tokens=int(rng.integers(1, 13)), temperature=0.8 * (index % 2), seed=index
            ),
        )
        for index, prompt in enumerate(prompts)
    ]


def make_engine(folder, options):
    ranks, definition = Ranks.from_environment(), define_model(folder)
    plan = make_plan(definition, ranks.num_ranks, "random")
    slots = [layer[ranks.rank] for layer in plan.slots]
    weights = load_weights(Checkpoint(folder), definition, slots, dtype=torch.float32, device=CPU)
    return Engine(Decoder(definition, weights), plan, ranks, options=options)


def run_together(folder, cases):
    """By case: completions, and the most pages of a domain that were ever in use."""
    return [run_case(folder, case) for case in cases]


def run_case(folder, options):
    engine = make_engine(folder, options)
    most, flights, found, schedule = 0, 0, {}, []
    prefill, decode = engine._steps.prefill, engine._steps.decode

    def watch(step):
        def watched(work, cache, *others):
            nonlocal most, flights
            pools = engine.scheduler.pools
            used = [pool.num_pages - pool.num_free for pool in pools]
            held = [page for f in engine.scheduler.running for page in f.pages if f.domain == 0]
            assert len(held) == len(set(held)) == used[0]
            assert cache.entries.shape[0] <= BUDGET_TOKENS * 3
            most, flights = max(most, *used), max(flights, len(engine.scheduler.running))
            schedule.append((step.__name__, [getattr(w, "slot", None) for w in work]))
            return step(work, cache, *others)

        return watched

    object.__setattr__(engine._steps, "prefill", watch(prefill))
    object.__setattr__(engine._steps, "decode", watch(decode))
    for done in engine.generate(make_requests()):
        found[done.request.index] = (done.finish_reason, done.token_ids)
    return found, most, flights, schedule


def run_alone(folder):
    engine = make_engine(folder, EngineOptions(batch_size=1, prefill_chunk=None))
    return {
        request.index: (done.finish_reason, done.token_ids)
        for request in make_requests()
        if request.index != HUGE
        for done in engine.generate([request])
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return qwen3_moe(tmp_path_factory.mktemp("model") / "tiny", mlp_only_layers=[1])


@pytest.fixture(scope="module")
def alone(folder):
    return run_ranks(1, run_alone, folder)[0]


def options(**changes):
    budget = KvBudget(tokens=BUDGET_TOKENS)
    return EngineOptions(batch_size=8, kv_budget=budget, prefill_chunk=16, **changes)


CASES = {
    1: [options()],
    2: [options(protocol="home"), options()],
    4: [
        options(protocol="home"),
        options(coherence_domain=2),
        options(dispatch="hierarchical"),
        options(dispatch="replicated"),
    ],
}


@pytest.mark.parametrize("num_ranks", CASES)
def test_64_requests_that_join_and_leave_get_the_tokens_each_gets_alone(folder, alone, num_ranks):
    by_rank = run_ranks(num_ranks, run_together, folder, CASES[num_ranks], timeout=280)
    for number in range(len(CASES[num_ranks])):
        found, most, flights, _ = by_rank[0][number]
        assert all(results[number] == by_rank[0][number] for results in by_rank)
        assert found.pop(HUGE) == ("refused", ())
        assert found == alone
        assert most <= BUDGET_TOKENS // PAGE_SIZE
        assert flights > 1
