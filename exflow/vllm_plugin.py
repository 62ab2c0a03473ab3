"""vLLM plug-in: serves a placement plan as vLLM's expert load balancing policy.

vLLM 0.33 loads no placement file, but asks a policy for one. With `EXFLOW_PLAN=plan.json` set, our
policy answers with the plan: it is installed as `default` in every process that loads vLLM's
general plug-ins (entry point group `vllm.general_plugins`). Without the variable nothing changes.

The policy is asked once a model, without the model's name, so plans are told apart by the shape of
the load they are for: (MoE layers, experts). Several plans (target and drafter) are separated by
commas. A model that no plan has the shape of keeps vLLM's own policy.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.errors import UserError
from placement.interop.slots import slots_per_rank, to_rows
from placement.plan import PlacementPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIABLE = "EXFLOW_PLAN"

logger = logging.getLogger("vllm.plugins.exflow")  # vLLM shows the logs below its own name


class PluginError(UserError):
    """A plan that this vLLM server cannot run."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; may be called more than once a process."""
    paths = [path for path in os.environ.get(VARIABLE, "").split(",") if path]
    if not paths:
        return
    plans = [PlacementPlan.load(path) for path in paths]
    policies = importlib.import_module("vllm.distributed.eplb.policy").EPLB_POLICIES
    base = policies["default"]
    if not hasattr(base, "exflow_plans"):
        policies["default"] = make_policy(base, plans)
        logger.info("expert placement of %s is served by exflow", ", ".join(paths))


def make_policy(base: Any, plans: Sequence[PlacementPlan]) -> Any:
    """A policy class that answers with plans.

    Args:
        base: the policy class to derive from and to fall back to.
        plans: told apart by (MoE layers, experts).
    """

    class PlanPolicy(base):  # type: ignore[misc]
        """Returns the plan, whatever the load."""

        exflow_plans = tuple(plans)

        @classmethod
        def rebalance_experts(
            cls,
            weight: Any,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: Any = None,
        ) -> Any:
            """(MoE layers, num_replicas) logical experts, as vLLM's AbstractEplbPolicy asks."""
            plan = find_plan(cls.exflow_plans, tuple(weight.shape))
            if plan is None:
                logger.warning("no plan for a model of shape %s; vLLM balances", weight.shape)
                return base.rebalance_experts(
                    weight, num_replicas, num_groups, num_nodes, num_ranks,
                    old_global_expert_indices,
                )  # fmt: skip
            rows = slot_rows(plan, num_replicas=num_replicas, num_ranks=num_ranks)
            if old_global_expert_indices is not None:
                old = old_global_expert_indices.cpu().numpy()
                rows = base.preserve_intragpu_slots(rows, num_ranks, old)
            return _tensor_like(rows)

    return PlanPolicy


def find_plan(plans: Sequence[PlacementPlan], shape: tuple[int, ...]) -> PlacementPlan | None:
    """The plan for a load of that (MoE layers, experts)."""
    return next((plan for plan in plans if (plan.num_layers, plan.num_experts) == shape), None)


def slot_rows(
    plan: PlacementPlan, *, num_replicas: int, num_ranks: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """(MoE layers, num_replicas) logical expert of each slot.

    Raises:
        PluginError: if the server's slots or ranks are not the plan's.
    """
    share = slots_per_rank(plan)
    if share is None:
        msg = "vLLM needs the same number of slots on all ranks; `exflow lint --target vllm` says where"
        raise PluginError(msg)
    if (num_ranks, num_replicas) != (plan.num_ranks, share * plan.num_ranks):
        redundant = share * plan.num_ranks - plan.num_experts
        msg = (
            f"the plan is for {plan.num_ranks} ranks with {share * plan.num_ranks} slots a layer, "
            f"this server has {num_ranks} ranks with {num_replicas}; start it on {plan.num_ranks} "
            f"expert-parallel ranks with --eplb-config '{{\"num_redundant_experts\": {redundant}}}'"
        )
        raise PluginError(msg)
    return np.array(to_rows(plan), dtype=np.int64)


def _tensor_like(rows: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Any:
    import torch

    return torch.from_numpy(rows)
