"""On a GPU a decode step without rows that travel never waits for the host, in any layer.

Layers run on tensors that have shapes and no values, by the code for GPUs: whatever asked for a
value, or for a shape that depends on one, would be an error. So such a step can be captured.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from exflow.models.checkpoint import Checkpoint
from exflow.models.families import define_model
from exflow.runtime import experts, hops, rows, tables
from exflow.runtime.attention import DecodeAttention, Rotary
from exflow.runtime.decoder import Decoder
from exflow.runtime.dispatcher import HomeDispatcher, LocalDispatcher, Tokens
from exflow.runtime.forward import run_layers
from exflow.runtime.kv_cache import KvCache
from exflow.runtime.metrics import PhaseMetrics
from exflow.runtime.replicated import ReplicatedDispatcher
from exflow.runtime.rows import RowFormat
from exflow.runtime.tables import PlacementTables
from exflow.runtime.weights import load_weights
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology
from tiny_checkpoints import deepseek_v3, gpt_oss, mixtral, qwen2_moe

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
FAMILIES = {"mixtral": mixtral, "qwen2": qwen2_moe, "deepseek": deepseek_v3, "gpt-oss": gpt_oss}


class FakeWire:
    """Two ranks, of which the other sends what this one does."""

    ranks_per_node = num_ranks = 2
    rank = 0

    def share_rows(self, rows_NB, *, kind, layer):
        return torch.stack([rows_NB, rows_NB])


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    for module in (experts, hops, rows, tables):
        monkeypatch.setattr(module, "is_known", lambda tensor: False)


def without_values(value):
    """The same, of tensors that have none."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value)
    if isinstance(value, (tuple, list)):
        return type(value)(without_values(part) for part in value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        fields = {name: without_values(part) for name, part in fields.items()}
        return dataclasses.replace(value, **fields)
    return value


def make_plan(definition, num_ranks):
    """Every expert on each rank in turn; the first has a copy on the last."""
    layers, experts = len(definition.moe_layer_ids), definition.num_experts
    hosts = np.zeros((layers, experts, num_ranks), dtype=bool)
    hosts[:, np.arange(experts), np.arange(experts) % num_ranks] = True
    hosts[:, 0, -1] = True
    return PlacementPlan.from_hosts(
        hosts,
        model=definition.name,
        layer_ids=definition.moe_layer_ids,
        topology=Topology(num_nodes=1, ranks_per_node=num_ranks),
        strategy=Strategy(name="test"),
    )


def run_step(folder, make_dispatcher, num_ranks):
    """Three tokens through all layers."""
    definition = define_model(folder)
    plan = make_plan(definition, num_ranks)
    slots = [layer[0] for layer in plan.slots]
    weights = load_weights(Checkpoint(folder), definition, slots, dtype=DTYPE, device=CPU)
    tables = PlacementTables.from_plan(
        plan, 0, top_k=definition.top_k, coherence_domain=None, device=CPU
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache = KvCache(
            num_layers=definition.num_layers,
            num_pages=8,
            width=definition.kv_width,
            num_slots=4,
            pages_per_slot=2,
            dtype=DTYPE,
            device=CPU,
        )
        attention = DecodeAttention(
            definition,
            cache,
            Rotary(definition, dtype=DTYPE, device=CPU),
            positions_S=torch.zeros(4, dtype=torch.int64, device=CPU),
            longest=5,
        )
        tokens = Tokens(
            hidden=torch.empty(3, definition.hidden_size, dtype=DTYPE, device=CPU),
            slots=torch.zeros(3, dtype=torch.int64, device=CPU),
            owned=(3, 0)[:num_ranks],
        )
        return run_layers(
            Decoder(definition, without_values(weights)),
            tokens,
            attention,
            make_dispatcher(without_values(tables), definition),
            metrics=PhaseMetrics(plan.num_layers, num_ranks),
            recorder=None,
            sharing=None,
        )


def alone(tables, definition):
    return LocalDispatcher(tables=tables)


def replicated(tables, definition):
    return ReplicatedDispatcher(tables=tables, wire=FakeWire())


def home(tables, definition):
    row_format = RowFormat(
        hidden_size=definition.hidden_size, top_k=definition.top_k, dtype=DTYPE, has_owner=False
    )
    return HomeDispatcher(tables=tables, format=row_format, wire=FakeWire())


@pytest.mark.parametrize(("dispatcher", "num_ranks"), [(alone, 1), (replicated, 2)])
def test_no_layer_waits_for_the_host(folder, dispatcher, num_ranks):
    found = run_step(folder, dispatcher, num_ranks)
    assert found.hidden.shape == (3, define_model(folder).hidden_size)
    assert isinstance(found.hidden, FakeTensor)


def test_where_rows_travel_the_host_must_know_how_many(folder):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run_step(folder, home, 2)
