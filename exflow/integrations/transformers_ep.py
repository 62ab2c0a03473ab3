"""A `transformers` model whose experts are placed by a plan.

    model = AutoModelForCausalLM.from_pretrained(
        path, distributed_config=distributed_config(path, plan="plan.json")
    )

`transformers` applies named *parallel styles* to modules, as the expert-parallel plan of its
`DistributedConfig` says, before it loads weights. Styles are a public registry; ours is entered
there for the empty name, which is the whole model. It takes the parameters of all experts away, so
that the loader passes them over, reads the slots of this rank instead, and puts
`placed_experts.PlacedExperts` in the place of the experts' forward.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from exflow.integrations.placed_experts import PlacedExperts, make_dispatcher, read_slots
from exflow.models.checkpoint import Checkpoint, checkpoint_folder
from exflow.models.families import define_model
from exflow.models.gpt_moe import MODEL_TYPE as GPT_MOE
from exflow.runtime.ranks import Ranks
from exflow.runtime.tensor_reader import TensorReader
from placement.errors import UserError
from placement.plan import PlacementPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.distributed.configuration_utils import DistributedConfig

    from exflow.models.definition import DecoderDefinition

PLAN_VARIABLE = "EXFLOW_PLAN"
EXPERTS = "mlp.experts"


class TransformersError(UserError):
    """A model, a plan or a `transformers` that cannot be brought together."""


def distributed_config(
    model: str | Path,
    plan: PlacementPlan | str | Path | None = None,
    *,
    has_shared_batch: bool = True,
) -> DistributedConfig:
    """What to give `from_pretrained` as `distributed_config`, on every rank.

    Everything that can be wrong is checked here, before the ranks meet.

    Args:
        model: the folder or hub id that `from_pretrained` is given.
        plan: a placement plan or its file; None for the file that EXFLOW_PLAN names.
        has_shared_batch: every rank is given the same batch and gets all logits, and holds the
            whole dense part; else each rank has a batch of its own, and FSDP2 shards the dense
            part. `generate` then needs as many steps on every rank (`synced_gpus=True`).

    Raises:
        UserError: the plan is for another model or other ranks, or the model's experts cannot be
            placed.
    """
    ranks = Ranks.from_environment()
    folder = checkpoint_folder(str(model))
    config = _read_config(folder)
    is_local = Path(model).is_dir()
    definition = define_model(folder, name=folder.resolve().name if is_local else str(model))
    placed = _load_plan(plan)
    placed.check_for(
        model=definition.name,
        num_experts=definition.num_experts,
        layer_ids=definition.moe_layer_ids,
        num_ranks=ranks.num_ranks,
    )
    style = PlanStyle(
        model=str(model),
        definition=definition,
        plan=placed,
        checkpoint=Checkpoint(folder),
        ranks=ranks,
        has_shared_batch=has_shared_batch,
    )
    return _config(style, config)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanStyle:
    """A parallel style of `transformers`: this plan, for this model.

    Attributes:
        model: as `from_pretrained` is given it.
        definition: the same model, as the runtime knows it.
        plan: fits both the model and the ranks.
        checkpoint: where to read experts.
        ranks: this rank.
        has_shared_batch: whether every rank is given the same tokens.
    """

    model: str
    definition: DecoderDefinition
    plan: PlacementPlan
    checkpoint: Checkpoint
    ranks: Ranks
    has_shared_batch: bool

    @property
    def name(self) -> str:
        """The style's name in the registry: another for another model or plan."""
        content = repr((self.model, self.plan, self.has_shared_batch)).encode()
        return f"exflow_{hashlib.sha256(content).hexdigest()[:12]}"

    def validate_param(self, *_: Any, **__: Any) -> None:
        """Nothing to check parameter by parameter."""

    def shard_param(self, *_: Any) -> None:
        """Parameters of experts are read by `install_forward`."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Place the experts of a model that is still without weights.

        Args:
            module: the model; modules inside it are left alone.
            mesh: the ranks that share the experts.

        Raises:
            TransformersError: the model is not the one that was checked.
        """
        from transformers import PreTrainedModel

        if isinstance(module, PreTrainedModel):
            self._place(module, torch.device(mesh.device_type))
        return module

    def _place(self, model: PreTrainedModel, device: torch.device) -> None:
        given = model.config.name_or_path or ""
        if Path(given) != Path(self.model):
            msg = f"the plan was checked for {self.model}, from_pretrained loads {given}"
            raise TransformersError(msg)
        found = {
            name: module for name, module in model.named_modules() if name.endswith(f".{EXPERTS}")
        }
        layer_ids = self.definition.moe_layer_ids
        names = [f"{model.base_model_prefix}.layers.{layer}.{EXPERTS}" for layer in layer_ids]
        if list(found) != names:
            msg = f"{type(model).__name__} has experts at {list(found)}, expected {names}"
            raise TransformersError(msg)
        dtype = next(iter(found[names[0]].parameters())).dtype
        reader = TensorReader(
            checkpoint=self.checkpoint, definition=self.definition, dtype=dtype, device=device
        )
        dispatcher = make_dispatcher(
            self.plan, self.definition, self.ranks, dtype=dtype, device=device
        )
        for layer, name in enumerate(names):
            module = found[name]
            self._fill(module, layer, reader)
            module.forward = PlacedExperts(
                run=module.forward,
                layer=layer,
                dispatcher=dispatcher,
                has_shared_batch=self.has_shared_batch,
            )
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            rf"\.{EXPERTS}\.",
        }
        model.save_pretrained = _refuse_to_save  # type: ignore[method-assign]

    def _fill(self, module: nn.Module, layer: int, reader: TensorReader) -> None:
        """The slots of this rank in the place of all experts."""
        experts = self.plan.slots[layer][self.ranks.rank]
        shapes: Mapping[str, torch.Size] = {
            name: parameter.shape[1:] for name, parameter in module.named_parameters()
        }
        names = self.definition.weights
        prefix = names.layer.format(layer=self.definition.moe_layer_ids[layer]) + names.experts
        for name, slots in read_slots(reader, prefix, experts, shapes).items():
            # No parameter or buffer: the loader would take it for missing, and initialize it.
            delattr(module, name)
            setattr(module, name, slots)
        module.num_experts = len(experts)  # type: ignore[assignment]
        module._is_hf_initialized = True  # type: ignore[assignment]


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    msg = (
        "this rank holds the experts of its own slots only, so the model cannot be saved; the "
        "checkpoint it was loaded from is unchanged, and `exflow export --target checkpoint` "
        "writes one in the plan's order"
    )
    raise TransformersError(msg)


def _read_config(folder: Path) -> PretrainedConfig:
    """The model's configuration, if its experts can be placed.

    Raises:
        TransformersError: they cannot.
    """
    definition = define_model(folder)
    if definition.family == GPT_MOE:
        msg = f"{folder}: transformers has no {GPT_MOE} model; decode it with `exflow run`"
        raise TransformersError(msg)
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        msg = (
            f"{folder} is quantized, and experts are placed in float formats only; give a "
            "checkpoint without quantization_config, or decode it with `exflow run`"
        )
        raise TransformersError(msg)
    return config


def _load_plan(plan: PlacementPlan | str | Path | None) -> PlacementPlan:
    if isinstance(plan, PlacementPlan):
        return plan
    path = plan or os.environ.get(PLAN_VARIABLE)
    if not path:
        msg = f"no plan: give plan=FILE or set {PLAN_VARIABLE}; make one with `exflow place`"
        raise TransformersError(msg)
    return PlacementPlan.load(path)


def _config(style: PlanStyle, config: PretrainedConfig) -> DistributedConfig:
    """Enter the style and name it for the whole model, instead of the rules the model brings."""
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
        from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    except ImportError as error:
        msg = f"expert parallelism by a plan needs transformers 5.21 or newer: {error}"
        raise TransformersError(msg) from error
    ALL_PARALLEL_STYLES.register(style.name, style)  # type: ignore[arg-type]
    brought = getattr(config, "base_model_ep_plan", None) or {}
    rules = {"": style.name} | {f"model.{name}": style.name for name in brought}
    # transformers asks for this name before it applies a plan rank by rank; on a parameter it
    # does nothing.
    rules[f"model.layers.*.{EXPERTS}.down_proj"] = "ep_dispatch_experts"
    size = style.ranks.num_ranks
    if style.has_shared_batch:
        return DistributedConfig(tp_size=size, tp_plan={}, ep_size=size, ep_plan=rules)
    return DistributedConfig(fsdp_size=size, ep_size=size, ep_plan=rules)
