"""The vLLM plug-in with a stand-in for vLLM's policy module (fixture); the real one is in
test_interop_real_packages.py."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from exflow import vllm_plugin
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology


def make_plan(share=3):
    slots = tuple(
        tuple(tuple((r * 2 + i + layer) % 8 for i in range(share)) for r in range(4))
        for layer in range(2)
    )
    return PlacementPlan(
        model="toy",
        num_experts=8,
        layer_ids=(1, 2),
        topology=Topology(num_nodes=1, ranks_per_node=4),
        strategy=Strategy(name="test"),
        slots=slots,
    )


class BasePolicy:
    """Keeps the order of slots; answers for models without a plan."""

    @classmethod
    def rebalance_experts(cls, weight, num_replicas, *_):
        return torch.zeros(len(weight), num_replicas, dtype=torch.int64)

    @classmethod
    def preserve_intragpu_slots(cls, rows, num_ranks, old):
        assert old.shape == rows.shape
        return rows


@pytest.fixture
def policies(monkeypatch):
    """The modules that the plug-in imports, with a registry like vLLM's."""
    module = ModuleType("vllm.distributed.eplb.policy")
    module.EPLB_POLICIES = {"default": BasePolicy}
    for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.EPLB_POLICIES


def test_the_policy_answers_with_the_plan(tmp_path, policies, monkeypatch):
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    monkeypatch.setenv("EXFLOW_PLAN", str(tmp_path / "plan.json"))
    vllm_plugin.register()
    vllm_plugin.register()
    answer = policies["default"].rebalance_experts(
        torch.rand(2, 8), 12, 1, 1, 4, torch.zeros(2, 12, dtype=torch.int64)
    )
    expected = [[e for on_rank in ranks for e in on_rank] for ranks in plan.slots]
    assert answer.tolist() == expected
    assert (answer.device.type, answer.dtype) == ("cpu", torch.int64)
    assert policies["default"].__mro__.count(BasePolicy) == 1


def test_a_model_no_plan_has_the_shape_of_keeps_vllms_policy(tmp_path, policies, monkeypatch):
    make_plan().save(tmp_path / "plan.json")
    monkeypatch.setenv("EXFLOW_PLAN", str(tmp_path / "plan.json"))
    vllm_plugin.register()
    assert not policies["default"].rebalance_experts(torch.rand(1, 8), 12, 1, 1, 4).any()


def test_without_the_variable_nothing_changes(policies, monkeypatch):
    monkeypatch.delenv("EXFLOW_PLAN", raising=False)
    vllm_plugin.register()
    assert policies["default"] is BasePolicy


def test_a_server_with_other_slots_is_refused_with_the_option_to_set():
    with pytest.raises(vllm_plugin.PluginError, match=r'"num_redundant_experts": 4'):
        vllm_plugin.slot_rows(make_plan(), num_replicas=8, num_ranks=4)


def test_the_rows_are_rank_by_rank():
    rows = vllm_plugin.slot_rows(make_plan(share=2), num_replicas=8, num_ranks=4)
    assert np.array_equal(rows, [[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0]])
