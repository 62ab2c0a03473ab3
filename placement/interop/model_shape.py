"""ModelShape: what an engine's file leaves out and the model's config.json tells."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.identity import span
from placement.interop.errors import ConfigError
from placement.json_text import parse_json
from placement.trace import MAX_EXPERTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from placement.plan import PlacementPlan

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k")
MAX_LAYERS = 10_000
DISAGREEMENT = "the config, the options and the files must agree"
LAYERS = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


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

    def __post_init__(self) -> None:
        experts = self.num_experts or MAX_EXPERTS
        for what, number, most in (
            ("the number of layers", self.num_layers, MAX_LAYERS),
            ("the number of experts", self.num_experts, MAX_EXPERTS),
            ("experts a token (top-k)", self.top_k, experts),
            ("the number of expert groups", self.num_groups, experts),
            ("groups a token", self.top_groups, experts),
        ):
            if number is not None and not 1 <= number <= most:
                msg = f"{what}: {number}, expected 1 to {most}"
                raise ConfigError(msg)
        if not 0 <= self.num_mtp_layers <= MAX_LAYERS:
            msg = (
                f"multi-token-prediction layers: {self.num_mtp_layers}, expected 0 to {MAX_LAYERS}"
            )
            raise ConfigError(msg)
        if experts % self.num_groups:
            msg = f"{experts} experts make no {self.num_groups} equal groups"
            raise ConfigError(msg)
        self._check_layers(self.moe_layers, self.num_layers or MAX_LAYERS)

    @staticmethod
    def _check_layers(layers: tuple[int, ...] | None, num_layers: int) -> None:
        if layers is None:
            return
        if not layers:
            msg = "the model has no layer with experts"
            raise ConfigError(msg)
        if layers != tuple(sorted(set(layers))) or layers[0] < 0 or layers[-1] >= num_layers:
            msg = f"MoE layers {span(layers)}: expected rising numbers from 0 to {num_layers - 1}"
            raise ConfigError(msg)

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
            return _from_config(config)
        except ConfigError as error:
            msg = f"{file}: {error}"
            raise ConfigError(msg) from error
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

    def filled(
        self,
        *,
        model: str | None = None,
        num_layers: int | None = None,
        moe_layers: tuple[int, ...] | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
    ) -> ModelShape:
        """The same with what was not known filled in; the model may be renamed.

        Raises:
            ConfigError: something is known to be different.
        """
        filled = replace(
            self,
            model=model or self.model,
            num_layers=_agreed("layers", self.num_layers, num_layers),
            num_experts=_agreed("experts", self.num_experts, num_experts),
            top_k=_agreed("experts a token (top-k)", self.top_k, top_k),
        )
        if moe_layers is None or self.moe_layers == moe_layers:
            return filled
        if self.moe_layers is not None:
            msg = f"MoE layers {span(self.moe_layers)} and {span(moe_layers)}: {DISAGREEMENT}"
            raise ConfigError(msg)
        return replace(filled, moe_layers=moe_layers)

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
        match = LAYERS.fullmatch(part.strip())
        if match is None:
            msg = f"layers {text!r}: expected numbers and ranges below 10000, as 1-26 or 1,3,5"
            raise ConfigError(msg)
        first, last = int(match[1]), int(match[2] or match[1])
        layers += range(first, last + 1) if first <= last else (first, last)
    if sorted(set(layers)) != layers:
        msg = f"layers {text!r}: each layer once, in rising order"
        raise ConfigError(msg)
    return tuple(layers)


def _agreed(what: str, known: int | None, given: int | None) -> int | None:
    if known is not None and given not in {None, known}:
        msg = f"{known} and {given} {what}: {DISAGREEMENT}"
        raise ConfigError(msg)
    return given if known is None else known


def _unknown(what: str, option: str) -> str:
    return f"the file does not tell {what}; give --config path/to/config.json or {option}"


def _from_config(config: object) -> ModelShape:
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    if not isinstance(config, dict) or "num_hidden_layers" not in config:
        msg = "not a model's config.json (no num_hidden_layers)"
        raise ConfigError(msg)
    experts = _first(config, EXPERT_KEYS)
    if experts is None:
        msg = f"the model has no routed experts (none of {', '.join(EXPERT_KEYS)})"
        raise ConfigError(msg)
    layers = _first(config, ("num_hidden_layers",))
    if layers is None or not 1 <= layers <= MAX_LAYERS:
        msg = f"num_hidden_layers is {layers}, expected 1 to {MAX_LAYERS}"
        raise ConfigError(msg)
    return ModelShape(
        model=str(config.get("_name_or_path") or ""),
        num_layers=layers,
        moe_layers=tuple(i for i in range(layers) if _is_moe(config, i)),
        num_experts=experts,
        top_k=_first(config, TOP_K_KEYS),
        num_groups=_first(config, ("n_group",)) or 1,
        top_groups=_first(config, ("topk_group",)) or 1,
        num_mtp_layers=_first(config, ("num_nextn_predict_layers",)) or 0,
        scoring=_scoring(config),
        group_score="top2" if config.get("topk_method") == "noaux_tc" or _is_v3(config) else "max",
    )


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    key, value = next(
        ((key, config[key]) for key in keys if config.get(key) is not None), ("", None)
    )
    if value is not None and type(value) is not int:
        msg = f"{key} must be a whole number, got {value!r:.40}"
        raise ConfigError(msg)
    return value


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
