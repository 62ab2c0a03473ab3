"""The bytes of a row on the wire: the residual stream and its metadata, in one buffer.

    | hidden state, D elements | choices, K int32 | gate weights, K float32 | slot, next owner |

The last two (int32) travel only where owners move. A hidden state is a whole number of words of
four bytes. Shape suffixes: T tokens, N rows, K choices, D hidden size, B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exflow.runtime import cpu_rows
from exflow.runtime.experts import is_known
from placement.errors import UserError

WORD = 4


class RowError(UserError):
    """Rows that cannot be sent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Metadata:
    """What rows say besides the hidden state.

    Attributes:
        choices: int64 (N, K).
        weights: float32 (N, K) gate weights.
        owners: int64 (2, N) request slots, and the ranks that own the tokens after this layer;
            (0, N) where owners do not move.
    """

    choices: torch.Tensor
    weights: torch.Tensor
    owners: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """Where the parts of a row are.

    Raises:
        RowError: a hidden state is not a whole number of words.
    """

    hidden_size: int
    top_k: int
    dtype: torch.dtype
    has_owner: bool

    def __post_init__(self) -> None:
        if self.payload_bytes % WORD:
            msg = (
                f"a hidden state of {self.hidden_size} elements in {self.dtype} is not a whole "
                f"number of {WORD} bytes; use --dtype float32"
            )
            raise RowError(msg)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the hidden state."""
        return self.hidden_size * self.dtype.itemsize

    def pack(
        self,
        hidden_TD: torch.Tensor,
        choices_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        *owners_T: torch.Tensor,
    ) -> torch.Tensor:
        """uint8 (T, B) rows; `owners_T` are the slots and next owners, if they travel."""
        owners_OT = (
            torch.stack(owners_T) if owners_T else choices_TK.new_empty((0, len(choices_TK)))
        )
        hidden_TH = hidden_TD.contiguous().view(torch.int32)
        weights_TK = weights_TK.to(torch.float32).view(torch.int32)
        if is_known(hidden_TD):
            parts = (hidden_TH, choices_TK, weights_TK, owners_OT)
            rows_TY = torch.from_numpy(cpu_rows.pack(*(part.numpy() for part in parts)))
        else:
            words = [choices_TK.to(torch.int32), weights_TK, owners_OT.t().to(torch.int32)]
            rows_TY = torch.cat([hidden_TH, *words], dim=1)
        return rows_TY.view(torch.uint8)

    def hidden(self, rows_NB: torch.Tensor) -> torch.Tensor:
        """(N, D) hidden states, a view."""
        return rows_NB[:, : self.payload_bytes].view(self.dtype)

    def metadata(self, rows_NB: torch.Tensor) -> Metadata:
        """What else rows say."""
        top_k, rows_NY = self.top_k, rows_NB.view(torch.int32)
        if is_known(rows_NB):
            found = cpu_rows.unpack(rows_NY.numpy(), top_k, 2 * self.has_owner)
            choices_NK, weights_NK, owners_ON = map(torch.from_numpy, found)
        else:
            words_NX = rows_NY[:, self.payload_bytes // WORD :]
            choices_NK = words_NX[:, :top_k].long()
            weights_NK = words_NX[:, top_k : 2 * top_k]
            owners_ON = words_NX[:, 2 * top_k :].t().long()
        weights_NK = weights_NK.view(torch.float32)
        return Metadata(choices=choices_NK, weights=weights_NK, owners=owners_ON)
