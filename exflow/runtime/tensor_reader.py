"""TensorReader: tensors of known shapes from a checkpoint, in the wanted number format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exflow.errors import CheckpointError
from exflow.runtime.norms import NormWeights

if TYPE_CHECKING:
    import torch

    from exflow.models.checkpoint import Checkpoint
    from exflow.models.definition import DecoderDefinition


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorReader:
    """Reads for one model.

    Attributes:
        checkpoint: where to read.
        definition: the model, with the names of its tensors.
        dtype: the number format to compute in.
        device: where the weights live.
    """

    checkpoint: Checkpoint
    definition: DecoderDefinition
    dtype: torch.dtype
    device: torch.device

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor."""
        return self._stored_name(name) in self.checkpoint

    def raw(
        self, name: str, shape: tuple[int, ...], *, rows: int | slice | None = None
    ) -> torch.Tensor:
        """A tensor, or these rows of it, as it is stored.

        Raises:
            CheckpointError: it is missing, damaged, or of another shape.
        """
        stored = self._stored_name(name)
        tensor = self.checkpoint.read(stored, rows)
        if tuple(tensor.shape) != shape:
            msg = (
                f"{self.checkpoint.folder}: {stored!r} has shape {tuple(tensor.shape)}, "
                f"config.json makes it {shape}"
            )
            raise CheckpointError(msg)
        return tensor

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        rows: int | slice | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """A tensor, or these rows of it, in the reader's format unless another is given."""
        tensor = self.raw(name, shape, rows=rows)
        return tensor.to(device=self.device, dtype=dtype or self.dtype)

    def linear(self, name: str, size_out: int, size_in: int) -> torch.Tensor:
        """(out, in) the weight of a linear layer, however it is stored."""
        if self.definition.weights.is_transposed:
            return self.read(f"{name}.weight", (size_in, size_out)).t()
        return self.read(f"{name}.weight", (size_out, size_in))

    def bias(self, name: str, size: int, *, is_there: bool) -> torch.Tensor | None:
        """A bias, where the model has one."""
        return self.read(f"{name}.bias", (size,)) if is_there else None

    def norm(self, name: str, size: int, *, eps: float | None = None) -> NormWeights:
        """A norm over `size` elements, with the model's epsilon unless another is given."""
        definition = self.definition
        return NormWeights(
            weight=self.read(f"{name}.weight", (size,)),
            bias=self.bias(name, size, is_there=definition.norm == "layer"),
            eps=definition.norm_eps if eps is None else eps,
        )

    def _stored_name(self, name: str) -> str:
        renamed = self.definition.weights.renamed
        if renamed is None or name in self.checkpoint:
            return name
        return name.replace(*renamed)
