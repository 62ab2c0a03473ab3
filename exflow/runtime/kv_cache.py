"""Keys and values in fixed pages.

A sequence's pages are the same on all ranks of its coherence domain, because each hands them out
in the same order. So an *address* (layer, page, offset) written on one rank is right on the others.

Shape suffixes: S slots, P pages a sequence may have, T tokens, C tokens of context, F elements of
one token's key and value.
"""

from __future__ import annotations

import torch

PAGE_SIZE = 16


class PagePool:
    """The free pages of a coherence domain.

    >>> pool = PagePool(3)
    >>> pool.take(2), pool.num_free
    ([0, 1], 1)
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))[::-1]

    @property
    def num_free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out pages, the last returned first; there must be enough."""
        assert count <= len(self._free)
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Take pages back."""
        self._free.extend(reversed(pages))


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


class KvCache:
    """All layers' keys and values of the sequences in flight.

    Attributes:
        entries: (layers * pages * PAGE_SIZE, F) one row a token and layer: its key, then its value.
        page_table: (S, P) pages of the sequence in each slot; zero where it has none.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        width: int,
        num_slots: int,
        pages_per_slot: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_tokens = num_pages * PAGE_SIZE
        # Zeros, because attention multiplies what lies past a sequence's end by zero.
        self.entries = torch.zeros(
            (num_layers * self.num_tokens, width), dtype=dtype, device=device
        )
        self._pages = self.entries.view(num_layers, num_pages, PAGE_SIZE * width)
        self.page_table = torch.zeros((num_slots, pages_per_slot), dtype=torch.int64, device=device)

    def has_shape(self, *, num_pages: int, num_slots: int, pages_per_slot: int) -> bool:
        """Whether it is of this size."""
        is_as_large = self.num_tokens == num_pages * PAGE_SIZE
        return is_as_large and self.page_table.shape == (num_slots, pages_per_slot)

    def clear(self) -> None:
        """Forget everything."""
        self.entries.zero_()
        self.page_table.zero_()

    def assign(self, slot: int, pages: list[int]) -> None:
        """Give a sequence its pages."""
        self.page_table[slot] = 0
        self.page_table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int64)

    def addresses(self, slots_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """(T,) addresses in layer 0; layer l lies `l * num_tokens` further."""
        pages_T = self.page_table[slots_T, positions_T // PAGE_SIZE]
        return pages_T * PAGE_SIZE + positions_T % PAGE_SIZE

    def write(self, addresses_T: torch.Tensor, entries_TF: torch.Tensor) -> None:
        """Store keys and values."""
        self.entries.index_copy_(0, addresses_T, entries_TF)

    def read(self, layer: int, pages_TP: torch.Tensor) -> torch.Tensor:
        """(T, C, F) the contents of pages, C = P * PAGE_SIZE."""
        contents = self._pages[layer].index_select(0, pages_TP.flatten())
        return contents.view(pages_TP.shape[0], -1, self.entries.shape[1])
