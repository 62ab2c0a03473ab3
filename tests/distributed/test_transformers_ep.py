"""A `transformers` model whose experts a plan places gives the logits of the unsharded model."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from exflow.integrations.transformers_ep import TransformersError, distributed_config
from exflow.models.families import define_model
from exflow.profiling.recorder import RoutingRecorder
from exflow.runtime.ranks import Ranks
from harness import run_ranks
from placement.errors import UserError
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology
from placement.trace import RoutingTrace
from placement.traffic import count_traffic
from tiny_checkpoints import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    make_prompts,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)

pytestmark = pytest.mark.distributed

FAMILIES = {
    "mixtral": (mixtral, {}),
    "qwen2-moe": (qwen2_moe, {"mlp_only_layers": [1]}),
    "qwen3-moe": (qwen3_moe, {"mlp_only_layers": [1]}),
    "olmoe": (olmoe, {"num_experts_per_tok": 3}),
    "gpt-oss": (gpt_oss, {}),
    "deepseek-v2": (deepseek_v2, {}),
    "deepseek-v3": (deepseek_v3, {}),
}
NEW_TOKENS = 4
# Of the largest logit, which is about 10 in these random models.
LARGEST_ERROR = 1e-5


@dataclass(frozen=True)
class Result:
    """What one rank computed for a model and a plan.

    Attributes:
        error: of its logits, relative to the largest.
        is_same: whether it generates the tokens of the unsharded model.
        rows: (layers, ranks) rows it sent, and as the planner counts them.
        slots: experts it holds, by layer.
        bytes_read: of experts, from the checkpoint.
        expert_bytes: of one expert.
        error_alone: of its logits where every rank has a batch of its own.
        refusal: what it says when it is told to save the model.
    """

    error: float
    is_same: bool
    rows: tuple
    slots: list
    bytes_read: int
    expert_bytes: int
    error_alone: float
    refusal: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: str(save(tmp_path_factory.mktemp(name) / "tiny", **changes))
        for name, (save, changes) in FAMILIES.items()
    }


@pytest.fixture(scope="module", params=[2, 4])
def placed(request, folders):
    return run_ranks(request.param, run_families, folders)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_tokens_are_those_of_the_unsharded_model(placed, name):
    for results in placed:
        assert results[name].error < LARGEST_ERROR
        assert results[name].is_same


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_on_the_wire_are_those_the_planner_counts(placed, name):
    for results in placed:
        measured, counted = results[name].rows
        assert measured.sum() > 0
        np.testing.assert_array_equal(measured, counted)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rank_reads_and_holds_the_experts_of_its_own_slots_only(placed, name, folders):
    plan = make_plan(folders[name], len(placed))
    for rank, results in enumerate(placed):
        slots = [len(layer[rank]) for layer in plan.slots]
        assert results[name].slots == slots
        assert results[name].bytes_read == sum(slots) * results[name].expert_bytes
    assert plan.has_replicas
    assert len({results[name].slots[0] for results in placed}) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_rank_may_have_a_batch_of_its_own(placed, name):
    for results in placed:
        assert results[name].error_alone < LARGEST_ERROR


def test_a_part_of_a_model_is_not_saved_as_if_it_were_all(placed):
    for results in placed:
        for result in results.values():
            assert "its own slots only, so the model cannot be saved" in result.refusal


def run_families(folders):
    return {name: run_family(folder) for name, folder in folders.items()}


def run_family(folder):
    """Load sharded and unsharded, and compare."""
    ranks, definition = Ranks.from_environment(), define_model(folder)
    plan = make_plan(folder, ranks.num_ranks)
    reference, model = load(folder), load(folder, plan)
    batch = torch.tensor(make_prompts([5, 5, 5]))
    dispatcher = placed_experts(model)[0].forward.dispatcher
    with torch.no_grad(), RoutingRecorder(reference) as recorder:
        expected = reference(batch).logits
        error = relative_error(model(batch).logits, expected)
    measured = dispatcher.wire.metrics.rows["dispatch"].copy()
    traffic = count_traffic(
        RoutingTrace(
            expert_ids=recorder.take()[0].expert_ids.numpy(),
            sequence_ids=np.arange(batch.numel(), dtype=np.int32),
            num_experts=definition.num_experts,
            model=definition.name,
            layer_ids=definition.moe_layer_ids,
        ),
        plan,
        protocol="home",
    )
    first = placed_experts(reference)[0]
    with pytest.raises(TransformersError) as refused:
        model.save_pretrained(folder)
    return Result(
        error=error,
        is_same=generate(model, batch) == generate(reference, batch),
        rows=(measured, traffic.dispatch[:, ranks.rank]),
        slots=[len(experts.down_proj) for experts in placed_experts(model)],
        bytes_read=style_of(model).checkpoint.bytes_read,
        expert_bytes=sum(weight[0].nbytes for weight in first.parameters()),
        error_alone=error_of_own_batch(folder, plan, reference),
        refusal=str(refused.value),
    )


def error_of_own_batch(folder, plan, reference):
    """Ranks have different numbers of tokens."""
    ranks = Ranks.from_environment()
    lengths = [5, 5, 5] if ranks.is_first else [9]
    batch = torch.tensor(make_prompts(lengths, seed=ranks.rank))
    with torch.no_grad():
        logits = load(folder, plan, has_shared_batch=False)(batch).logits
        return relative_error(logits, reference(batch).logits)


def load(folder, plan=None, **options):
    from transformers import AutoModelForCausalLM

    config = (
        {} if plan is None else {"distributed_config": distributed_config(folder, plan, **options)}
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)


def style_of(model):
    from transformers.distributed.expert_parallel import ALL_PARALLEL_STYLES

    return ALL_PARALLEL_STYLES[model.config.distributed_config.ep_plan[""]]


def placed_experts(model):
    return [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]


def relative_error(logits, expected):
    return float((logits - expected).abs().max() / expected.abs().max())


def generate(model, batch):
    tokens = model.generate(batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return tokens.tolist()


def make_plan(folder, num_ranks, *, seed=0):
    """Experts anywhere, about a fifth of all other places replicas."""
    definition, rng = define_model(folder), np.random.default_rng(seed)
    layers, experts = len(definition.moe_layer_ids), definition.num_experts
    hosts = rng.random((layers, experts, num_ranks)) < 0.2
    for layer in hosts:
        layer[np.arange(experts), rng.integers(0, num_ranks, experts)] = True
    return PlacementPlan.from_hosts(
        hosts,
        model=definition.name,
        layer_ids=definition.moe_layer_ids,
        topology=Topology(num_nodes=2, ranks_per_node=num_ranks // 2),
        strategy=Strategy(name="random"),
    )


def refusals(cases):
    """What each rank says, before it has sent anything to another."""
    messages = []
    for folder, plan in cases:
        with pytest.raises(UserError) as caught:
            distributed_config(folder, plan)
        messages.append(str(caught.value))
    return messages


def test_what_cannot_work_is_refused_on_every_rank_before_the_first_collective(folders, tmp_path):
    mixtral_plan = tmp_path / "mixtral.json"
    make_plan(folders["mixtral"], 2).save(mixtral_plan)
    for_four = tmp_path / "four.json"
    make_plan(folders["olmoe"], 4).save(for_four)
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"model_type": "llama"}')
    quantized = gpt_oss(tmp_path / "tiny")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (quantized / "config.json").write_text(json.dumps(config))
    expected = {
        (folders["qwen3-moe"], str(mixtral_plan)): "place a trace of this model",
        (folders["olmoe"], str(for_four)): "the plan is for 4 ranks, this job has 2",
        (str(dense), str(mixtral_plan)): "does not know the architecture 'llama'",
        (str(quantized), str(mixtral_plan)): "is quantized",
        (folders["olmoe"], str(tmp_path / "none.json")): "no such plan",
    }
    for messages in run_ranks(2, refusals, list(expected)):
        for message, part in zip(messages, expected.values(), strict=True):
            assert part in message


def test_the_plan_may_come_from_the_environment(folders, tmp_path, monkeypatch):
    monkeypatch.delenv("EXFLOW_PLAN", raising=False)
    with pytest.raises(TransformersError, match="set EXFLOW_PLAN"):
        distributed_config(folders["olmoe"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    make_plan(folders["olmoe"], 2).save(tmp_path / "plan.json")
    monkeypatch.setenv("EXFLOW_PLAN", str(tmp_path / "plan.json"))
    assert distributed_config(folders["olmoe"]).ep_size == 2
