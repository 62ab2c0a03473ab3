"""Exported files, loaded by the engines' own code.

The engines are no dependencies. Their tests run where a package imports, or where a variable names
the folder of an unpacked wheel (and, after a colon, of what it needs): EXFLOW_SGLANG_PATH,
EXFLOW_VLLM_PATH, EXFLOW_VLLM_ASCEND_PATH. docs/engines.md says how. Elsewhere the tests of
test_interop_targets.py on the documented schemas stand for them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from placement.interop.deepspeed import descriptor
from placement.interop.model_shape import ModelShape
from placement.interop.targets import export_text, find_target
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology

RANKS, NODES, EXPERTS, SHARE, LAYERS = 8, 2, 32, 5, 6
SHAPE = ModelShape(num_layers=LAYERS, moe_layers=tuple(range(1, LAYERS)), num_experts=EXPERTS)


def make_plan(seed=0):
    """Eight ranks on two nodes, five slots each for 32 experts: 25% redundant, layer 0 dense."""
    rng = np.random.default_rng(seed)
    slots = []
    for _ in SHAPE.moe_layers:
        layer = [part.tolist() for part in np.split(rng.permutation(EXPERTS), RANKS)]
        for rank, experts in enumerate(layer):
            experts.append(layer[(rank + 3) % RANKS][0])
        slots.append(tuple(tuple(experts) for experts in layer))
    return PlacementPlan(
        model="toy",
        num_experts=EXPERTS,
        layer_ids=SHAPE.moe_layers,
        topology=Topology(num_nodes=NODES, ranks_per_node=RANKS // NODES),
        strategy=Strategy(name="test"),
        slots=tuple(slots),
    )


def export(tmp_path, name):
    target = find_target(name)
    path = tmp_path / f"placement{target.suffix}"
    path.write_text(export_text(make_plan(), target, SHAPE))
    return path


def run_with(package, variable, script, *args, **environment):
    """Run a script in a fresh interpreter that can import the package; its last line is JSON."""
    paths = os.environ.get(variable, "")
    if not paths and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed and {variable} names no unpacked wheel")
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(sys.executable).parent,  # not here, where stale package metadata may lie
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def slots_of_rows(rows):
    return [[row[r * SHARE : (r + 1) * SHARE] for r in range(RANKS)] for row in rows]


def as_lists(slots):
    return [[list(experts) for experts in ranks] for ranks in slots]


SGLANG = """
import json, sys
from types import SimpleNamespace as Settings
import sglang.srt.eplb.expert_location as module
path, layers, experts, redundant, ranks, nodes = sys.argv[1], *map(int, sys.argv[2:])
moe = Settings(init_expert_location=path, ep_num_redundant_experts=redundant, ep_join_mode=None,
               moe_a2a_backend="deepep", ep_dispatch_algorithm="static")
module.get_exec = lambda: Settings(moe=moe)
module.get_parallel = lambda: Settings(ep_size=ranks, nnodes=nodes, elastic_ep_initial_size=None)
module.get_device = lambda: Settings(device="cpu")
module._prefer_same_node_experts = lambda: True
shape = module.ModelConfigForExpertLocation(num_layers=layers, num_logical_experts=experts)
module.ModelConfigForExpertLocation.from_model_config = staticmethod(lambda config: shape)
found = module.compute_initial_expert_location_metadata(None, 3)
print(json.dumps({
    "rows": found.physical_to_logical_map_cpu.tolist(),
    "local": found.num_local_physical_experts,
    "dispatch": found.logical_to_rank_dispatch_physical_map.tolist(),
}))
"""


@pytest.mark.slow
def test_real_sglang_loads_the_exported_expert_location(tmp_path):
    found = run_with(
        "sglang", "EXFLOW_SGLANG_PATH", SGLANG,
        export(tmp_path, "sglang"), LAYERS, EXPERTS, RANKS * SHARE - EXPERTS, RANKS, NODES,
    )  # fmt: skip
    plan = make_plan()
    assert slots_of_rows(found["rows"])[1:] == as_lists(plan.slots)
    assert found["local"] == SHARE
    for layer, ranks in enumerate(plan.slots, start=1):  # rank 3 runs its own copies
        for expert in ranks[3]:
            assert found["dispatch"][layer][expert] // SHARE == 3


VLLM = """
import json, os, sys
import torch
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy, DefaultEplbPolicy
policy = EPLB_POLICIES["default"]
layers, experts, slots, ranks = map(int, sys.argv[1:])
before = torch.arange(slots).remainder(experts).repeat(layers, 1)
after = policy.rebalance_experts(torch.rand(layers, experts), slots, 1, 2, ranks, before)
again = policy.rebalance_experts(torch.rand(layers, experts), slots, 1, 2, ranks, after)
drafter = policy.rebalance_experts(torch.rand(1, experts), slots, 1, 1, ranks)
refused = ""
try:
    policy.rebalance_experts(torch.rand(layers, experts), experts, 1, 2, ranks)
except ValueError as error:
    refused = str(error)
print(json.dumps({
    "rows": after.tolist(), "device": str(after.device), "again": again.tolist(),
    "ours": policy is not DefaultEplbPolicy, "is_policy": issubclass(policy, AbstractEplbPolicy),
    "drafter": list(drafter.shape), "refused": refused,
}))
"""


@pytest.mark.slow
def test_real_vllm_takes_the_plan_from_the_plugin(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    found = run_with(
        "vllm", "EXFLOW_VLLM_PATH", VLLM,
        plan.num_layers, EXPERTS, RANKS * SHARE, RANKS,
        EXFLOW_PLAN=str(tmp_path / "plan.json"), VLLM_PLUGINS="exflow",
    )  # fmt: skip
    assert found["ours"]
    assert found["is_policy"]
    placed = [[sorted(experts) for experts in ranks] for ranks in slots_of_rows(found["rows"])]
    assert placed == [[sorted(experts) for experts in ranks] for ranks in plan.slots]
    assert found["again"] == found["rows"]
    assert found["drafter"] == [1, RANKS * SHARE]
    assert '"num_redundant_experts": 8' in found["refused"]


VLLM_ENCODING = """
import json, sys
import numpy as np
from vllm.utils.serial_utils import numpy2base64
array = np.load(sys.argv[1])
print(json.dumps({"routed_experts": numpy2base64(array)}))
"""


@pytest.mark.slow
def test_what_real_vllm_encodes_is_imported(tmp_path):
    from placement.interop.importers import read_trace

    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((7, LAYERS, EXPERTS)), axis=2)[:, :, :4].astype(np.uint8)
    ids[:, 0] = 0
    np.save(tmp_path / "ids.npy", ids)
    choice = run_with("vllm", "EXFLOW_VLLM_PATH", VLLM_ENCODING, tmp_path / "ids.npy")
    (tmp_path / "r.json").write_text(json.dumps({"id": "a", "choices": [choice]}))
    trace = read_trace("vllm", [tmp_path / "r.json"], SHAPE)
    assert np.array_equal(trace.expert_ids, ids[:, 1:])


ASCEND = """
import json, sys
from types import ModuleType
from unittest.mock import MagicMock
import importlib.util
for name in ("vllm", "vllm.logger", "vllm.model_executor", "vllm.model_executor.layers",
             "vllm.model_executor.layers.fused_moe",
             "vllm.model_executor.layers.fused_moe.expert_map_manager",
             "vllm.model_executor.layers.fused_moe.layer"):
    sys.modules[name] = MagicMock()
root = importlib.util.find_spec("vllm_ascend").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("utils", root + "/eplb/core/eplb_utils.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
layers = [module.expert_file_to_tensor(sys.argv[1], layer) for layer in range(int(sys.argv[2]))]
print(json.dumps([[placement.tolist(), count] for placement, count in layers]))
"""


@pytest.mark.slow
def test_real_vllm_ascend_reads_the_exported_expert_map(tmp_path):
    path, plan = export(tmp_path, "vllm-ascend"), make_plan()
    found = run_with("vllm_ascend", "EXFLOW_VLLM_ASCEND_PATH", ASCEND, path, plan.num_layers)
    assert [placement for placement, _ in found] == as_lists(plan.slots)
    assert {count for _, count in found} == {RANKS * SHARE}


def test_real_deepspeed_accepts_the_descriptors_and_cuts_weights_by_them(tmp_path):
    affine = pytest.importorskip(
        "deepspeed.checkpoint.autoep_affine",
        reason="needs the extra [deepspeed]",
        exc_type=ImportError,
    )
    import torch

    plan = make_plan()
    layers = json.loads(export(tmp_path, "deepspeed").read_text())["expert_placement"]
    weight = torch.arange(EXPERTS * 2.0).reshape(EXPERTS, 2)
    for ordinal, layer in enumerate(plan.layer_ids):
        theirs = affine.make_autoep_placement_descriptor(EXPERTS, plan.slots[ordinal])
        assert layers[str(layer)] == theirs == descriptor(plan, ordinal)
        affine.validate_autoep_placement_descriptor(layers[str(layer)])
        cut = affine.autoep_placement_to_affine_map(layers[str(layer)], (EXPERTS, 2))
        for rank, experts in enumerate(plan.slots[ordinal]):
            assert affine.autoep_experts_for_rank(layers[str(layer)], rank) == list(experts)
            part = affine.extract_autoep_rank_tensor(weight, cut, rank)
            assert torch.equal(part, weight[list(experts)])


def test_tensorrts_schema_accepts_the_exported_yaml_as_a_strict_pydantic_model(tmp_path):
    """TensorRT-LLM's wheel is not on PyPI: a model made from its documented fields stands for it."""
    pydantic = pytest.importorskip("pydantic", reason="comes with deepspeed")
    yaml = pytest.importorskip("yaml", reason="comes with transformers")

    class MoeLoadBalancerConfig(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        num_slots: int | None = None
        initial_global_assignments: dict[int, list[int]] | None = None
        layer_updates_per_iter: int = 0

    data = yaml.safe_load(export(tmp_path, "trtllm").read_text())
    config = MoeLoadBalancerConfig(**data)
    plan = make_plan()
    assert config.num_slots == RANKS * SHARE
    for layer, ranks in zip(plan.layer_ids, plan.slots, strict=True):
        row = config.initial_global_assignments[layer]
        assert len(row) == config.num_slots
        assert set(row) == set(range(EXPERTS))
        assert slots_of_rows([row]) == as_lists([ranks])
