"""Whether traces and plans are of one model, and what tells them apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What a trace or a plan tells of its model.

    Models are the same if experts, MoE layers and the last part of their names are: a model of the
    hub and a folder with a copy of it. A recording whose engine does not tell the name is of model
    "unknown", which may be any.
    """

    model: str
    num_experts: int
    layer_ids: tuple[int, ...]

    def difference(self, other: ModelIdentity, *, names: tuple[str, str]) -> str | None:
        """What differs, where this is the first of two named things; None for the same model.

        >>> one = ModelIdentity(model="hub/toy", num_experts=8, layer_ids=(0, 1, 2))
        >>> two = ModelIdentity(model="toy", num_experts=8, layer_ids=(1, 2, 4))
        >>> one.difference(two, names=("the trace", "the plan"))
        'layer_ids is 0 to 2 in the trace, 1, 2, 4 in the plan'
        """
        if self.num_experts != other.num_experts:
            found = "num_experts", str(self.num_experts), str(other.num_experts)
        elif self.layer_ids != other.layer_ids:
            found = "layer_ids", span(self.layer_ids), span(other.layer_ids)
        elif UNKNOWN not in (self.model, other.model) and self._name != other._name:
            found = "model", self.model, other.model
        else:
            return None
        return f"{found[0]} is {found[1]} in {names[0]}, {found[2]} in {names[1]}"

    @property
    def _name(self) -> str:
        return Path(self.model).name


def span(layers: tuple[int, ...]) -> str:
    """Layers in few words.

    >>> span((0, 1, 2)), span((1, 3))
    ('0 to 2', '1, 3')
    """
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(str(layer) for layer in layers)
