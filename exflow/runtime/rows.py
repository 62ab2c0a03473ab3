"""The bytes of a row on the wire: the residual stream and its metadata, in one buffer.

    | hidden state, D elements | choices, K int32 | gate weights, K float32 | slot, next owner |

The last two (int32) travel only where owners move. Shape suffixes: T tokens, N rows, K choices,
D hidden size, B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORD = 4


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """Where the parts of a row are."""

    hidden_size: int
    top_k: int
    dtype: torch.dtype
    has_owner: bool

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
        words = [choices_TK.to(torch.int32), weights_TK.to(torch.float32).view(torch.int32)]
        if self.has_owner:
            words.append(torch.stack(owners_T, dim=1).to(torch.int32))
        metadata = torch.cat(words, dim=1).view(torch.uint8)
        return torch.cat([hidden_TD.contiguous().view(torch.uint8), metadata], dim=1)

    def hidden(self, rows_NB: torch.Tensor) -> torch.Tensor:
        """(N, D) hidden states, a view."""
        return rows_NB[:, : self.payload_bytes].view(self.dtype)

    def choices(self, rows_NB: torch.Tensor) -> torch.Tensor:
        """(N, K) choices."""
        return self._words(rows_NB, 0, self.top_k).long()

    def weights(self, rows_NB: torch.Tensor) -> torch.Tensor:
        """(N, K) float32 gate weights, a view."""
        return self._words(rows_NB, self.top_k, 2 * self.top_k).view(torch.float32)

    def slots(self, rows_NB: torch.Tensor) -> torch.Tensor:
        """(N,) request slots."""
        return self._words(rows_NB, 2 * self.top_k, 2 * self.top_k + 1)[:, 0].long()

    def next_owners(self, rows_NB: torch.Tensor) -> torch.Tensor:
        """(N,) ranks that own the tokens after this layer."""
        return self._words(rows_NB, 2 * self.top_k + 1, 2 * self.top_k + 2)[:, 0].long()

    def _words(self, rows_NB: torch.Tensor, start: int, end: int) -> torch.Tensor:
        first = self.payload_bytes
        return rows_NB[:, first + start * WORD : first + end * WORD].view(torch.int32)
