"""ModelShape: what an engine's file leaves out and the model's config.json tells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.interop.errors import ConfigError
from placement.json_text import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from placement.plan import PlacementPlan

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Layers, experts and router of a model; None where nobody said.

    Attributes:
        model: the model's name.
        num_layers: decoder layers, dense ones too, without multi-token-prediction layers.
        moe_layers: indices of the MoE layers among them.
        num_experts: logical experts per layer.
        top_k: experts a token uses at a layer.
        num_groups: expert groups of a group-limited router, 1 if it has none.
        top_groups: groups a token may use.
        num_mtp_layers: multi-token-prediction layers, numbered from `num_layers` on.
        scoring: "softmax" or "sigmoid".
        group_score: how a group is ranked: "max" or "top2" (sum of its two best scores).
    """

    model: str = ""
    num_layers: int | None = None
    moe_layers: tuple[int, ...] | None = None
    num_experts: int | None = None
    top_k: int | None = None
    num_groups: int = 1
    top_groups: int = 1
    num_mtp_layers: int = 0
    scoring: str = "softmax"
    group_score: str = "max"

    @classmethod
    def from_config(cls, path: str | Path) -> ModelShape:
        """Read a Hugging Face config.json, or the folder that holds it.

        Raises:
            ConfigError: if the file cannot be read or is of a model without experts.
        """
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        try:
            config = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            msg = f"{file}: not a readable config.json: {error}"
            raise ConfigError(msg) from error
        try:
            return _from_config(config, file)
        except ConfigError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            msg = f"{file}: a field of config.json has the wrong type: {error}"
            raise ConfigError(msg) from error

    @classmethod
    def of_plan(cls, plan: PlacementPlan) -> ModelShape:
        """What a plan tells: no dense layer after its last MoE layer, no groups."""
        return cls(
            model=plan.model,
            num_layers=max(plan.layer_ids) + 1,
            moe_layers=plan.layer_ids,
            num_experts=plan.num_experts,
        )

    def override(
        self,
        *,
        model: str | None = None,
        num_layers: int | None = None,
        moe_layers: tuple[int, ...] | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
    ) -> ModelShape:
        """The same with the fields that are given replaced."""
        return replace(
            self,
            model=model or self.model,
            num_layers=num_layers or self.num_layers,
            moe_layers=moe_layers or self.moe_layers,
            num_experts=num_experts or self.num_experts,
            top_k=top_k or self.top_k,
        )

    def need_experts(self) -> int:
        """The number of experts, or a ConfigError that names the option."""
        if self.num_experts is None:
            raise ConfigError(_unknown("the number of experts", "--num-experts"))
        return self.num_experts

    def need_top_k(self) -> int:
        """Experts a token, or a ConfigError that names the option."""
        if self.top_k is None:
            raise ConfigError(_unknown("how many experts a token uses", "--top-k"))
        return self.top_k

    def need_layers(self) -> int:
        """The number of decoder layers, or a ConfigError that names the option."""
        if self.num_layers is None:
            raise ConfigError(_unknown("the number of decoder layers", "--num-layers"))
        return self.num_layers

    def need_moe_layers(self) -> tuple[int, ...]:
        """The MoE layers, or a ConfigError that names the option."""
        if self.moe_layers is None:
            raise ConfigError(_unknown("which layers have experts", "--moe-layers"))
        return self.moe_layers


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer indices written as `1-26` or `1,3,5`.

    >>> parse_layers("1-3,7")
    (1, 2, 3, 7)

    Raises:
        ConfigError: for anything else.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            msg = f"layers {text!r}: expected numbers and ranges, as 1-26 or 1,3,5"
            raise ConfigError(msg)
        layers += range(int(first), int(last or first) + 1)
    if sorted(set(layers)) != layers:
        msg = f"layers {text!r}: each layer once, in rising order"
        raise ConfigError(msg)
    return tuple(layers)


def _unknown(what: str, option: str) -> str:
    return f"the file does not tell {what}; give --config path/to/config.json or {option}"


def _from_config(config: object, file: Path) -> ModelShape:
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    if not isinstance(config, dict) or "num_hidden_layers" not in config:
        msg = f"{file}: not a model's config.json (no num_hidden_layers)"
        raise ConfigError(msg)
    experts = _first(config, EXPERT_KEYS)
    if experts is None:
        msg = f"{file}: the model has no routed experts (none of {', '.join(EXPERT_KEYS)})"
        raise ConfigError(msg)
    layers = int(config["num_hidden_layers"])
    return ModelShape(
        model=str(config.get("_name_or_path") or ""),
        num_layers=layers,
        moe_layers=tuple(i for i in range(layers) if _is_moe(config, i)),
        num_experts=experts,
        top_k=_first(config, TOP_K_KEYS),
        num_groups=int(config.get("n_group") or 1),
        top_groups=int(config.get("topk_group") or 1),
        num_mtp_layers=int(config.get("num_nextn_predict_layers") or 0),
        scoring=_scoring(config),
        group_score="top2" if config.get("topk_method") == "noaux_tc" or _is_v3(config) else "max",
    )


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((int(config[key]) for key in keys if config.get(key) is not None), None)


def _is_v3(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type", "")) in {"deepseek_v3", "glm4_moe", "dots1"}


def _scoring(config: Mapping[str, Any]) -> str:
    return str(config.get("scoring_func") or ("sigmoid" if _is_v3(config) else "softmax"))


def _is_moe(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has experts, in the words of the model families."""
    types = config.get("mlp_layer_types")
    if isinstance(types, list) and len(types) > layer:
        return bool(types[layer] == "sparse")
    frequency = config.get("moe_layer_freq", 1)
    if isinstance(frequency, list):
        return len(frequency) > layer and bool(frequency[layer])
    if isinstance(config.get("moe_layers"), list):
        return layer in config["moe_layers"]
    return (
        layer >= int(config.get("first_k_dense_replace") or 0)
        and layer % int(frequency or 1) == 0
        and layer not in (config.get("mlp_only_layers") or ())
        and (layer + 1) % int(config.get("decoder_sparse_step") or 1) == 0
        and (layer + 1) % int(config.get("interleave_moe_layer_step") or 1) == 0
        and layer >= int(config.get("moe_layer_start_index") or 0)
    )
