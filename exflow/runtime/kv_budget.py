"""The memory for keys and values: what a user grants, in pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exflow.runtime.kv_cache import PAGE_SIZE
from placement.errors import UserError

if TYPE_CHECKING:
    import torch

    from exflow.models.definition import DecoderDefinition

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class KvBudgetError(UserError):
    """A KV memory budget that makes no sense."""


@dataclass(frozen=True, kw_only=True)
class KvBudget:
    """Memory for keys and values on each rank; what is None sets no limit.

    Attributes:
        tokens: tokens of context, over all requests of a coherence domain.
        num_bytes: bytes of a rank.
    """

    tokens: int | None = None
    num_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> KvBudget:
        """Read "2GiB", "500MB" or a number of tokens, "65536".

        Raises:
            KvBudgetError: it is neither.
        """
        match = _AMOUNT.fullmatch(text)
        amount, unit = match.groups() if match else ("", "")
        if match and not unit and amount.isdigit():
            return cls(tokens=int(amount))
        if unit.upper() not in UNITS:
            msg = f"KV memory must be bytes like 2GiB or 500MB, or tokens like 65536; got {text!r}"
            raise KvBudgetError(msg)
        return cls(num_bytes=int(float(amount) * UNITS[unit.upper()]))

    def pages(self, definition: DecoderDefinition, dtype: torch.dtype) -> int | None:
        """Pages that fit; None for no limit.

        Raises:
            KvBudgetError: not even one does.
        """
        page_bytes = PAGE_SIZE * token_bytes(definition, dtype)
        limits = []
        if self.tokens is not None:
            limits.append(self.tokens // PAGE_SIZE)
        if self.num_bytes is not None:
            limits.append(self.num_bytes // page_bytes)
        if not limits:
            return None
        if min(limits) < 1:
            msg = (
                f"the KV memory holds no page: a page is {PAGE_SIZE} tokens, {page_bytes} bytes "
                f"for {definition.name}; grant more"
            )
            raise KvBudgetError(msg)
        return min(limits)


def token_bytes(definition: DecoderDefinition, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return definition.num_layers * definition.kv_width * dtype.itemsize
