"""Attention over the paged cache: one token of many sequences, or whole prompts.

Shape suffixes: S slots, T tokens, P pages, C tokens of context, H query heads, J key-value heads,
G query heads a key-value head, E head size, F elements of a key and value (2 * J * E).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from exflow.runtime.kv_cache import PAGE_SIZE, pages_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.kv_cache import KvCache


class Attention(Protocol):
    """The attention of one forward pass.

    Attributes:
        written: (addresses, entries) of all keys and values the pass stored, in order.
    """

    written: list[tuple[torch.Tensor, torch.Tensor]]

    def rotation(self, slots_T: torch.Tensor) -> torch.Tensor:
        """(T, 2, E) cosines, and sines with their signs, for the tokens' positions."""

    def attend(
        self, layer: int, slots_T: torch.Tensor, query_THE: torch.Tensor, entries_TF: torch.Tensor
    ) -> torch.Tensor:
        """Store the tokens' keys and values; (T, H * E) what their queries find."""


class Rotary:
    """Rotary position embedding, the halves convention (Llama, Qwen, OLMoE)."""

    def __init__(
        self, definition: DecoderDefinition, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.frequencies = torch.tensor(
            definition.rope_frequencies, dtype=torch.float32, device=device
        )
        self.scaling = definition.rope_scaling
        self.dtype = dtype

    def at(self, positions_T: torch.Tensor) -> torch.Tensor:
        """(T, 2, E) cosines and signed sines."""
        angles = positions_T[:, None].float() * self.frequencies
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        halves = [torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)]
        return torch.stack(halves, dim=1).to(self.dtype)


def rotate(heads_THE: torch.Tensor, rotation_T2E: torch.Tensor) -> torch.Tensor:
    """Turn each half-pair of a head by its angle."""
    cos, sin = rotation_T2E[:, :1], rotation_T2E[:, 1:]
    swapped = heads_THE.roll(heads_THE.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads_THE * cos, swapped, sin)


class DecodeAttention:
    """One new token of each sequence; tokens of any slots of the domain may be here.

    What depends on the slots only is looked up once for as long as tokens stay where they are.
    """

    def __init__(
        self,
        definition: DecoderDefinition,
        cache: KvCache,
        rotary: Rotary,
        *,
        positions_S: torch.Tensor,
        longest: int,
    ) -> None:
        """Prepare a step.

        Args:
            definition: the model.
            cache: where keys and values are.
            rotary: position embedding.
            positions_S: position of each slot's new token.
            longest: the largest of these positions that is in use.
        """
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._definition = definition
        self._cache = cache
        slots_S = torch.arange(len(positions_S), device=positions_S.device)
        num_pages = longest // PAGE_SIZE + 1
        context = torch.arange(num_pages * PAGE_SIZE, device=positions_S.device)
        is_seen = context <= positions_S[:, None]
        self._mask_SC = torch.zeros_like(is_seen, dtype=rotary.dtype).masked_fill_(
            ~is_seen, float("-inf")
        )
        self._rotation_S2E = rotary.at(positions_S)
        self._addresses_S = cache.addresses(slots_S, positions_S)
        self._pages_SP = cache.page_table[:, :num_pages]
        layers = torch.arange(definition.num_layers, device=positions_S.device)
        self._layer_starts = layers[:, None] * cache.num_tokens
        self._slots: torch.Tensor | None = None

    def rotation(self, slots_T: torch.Tensor) -> torch.Tensor:
        """(T, 2, E) cosines and signed sines."""
        if slots_T is not self._slots:
            self._slots = slots_T
            self._rotation_T2E = self._rotation_S2E[slots_T]
            self._addresses_LT = self._layer_starts + self._addresses_S[slots_T]
            self._pages_TP = self._pages_SP[slots_T]
            self._mask_T11C = self._mask_SC[slots_T][:, None, None]
        return self._rotation_T2E

    def attend(
        self, layer: int, slots_T: torch.Tensor, query_THE: torch.Tensor, entries_TF: torch.Tensor
    ) -> torch.Tensor:
        """Write, gather pages, and attend with a mask over what is past the sequence's end."""
        self.rotation(slots_T)
        cache, definition = self._cache, self._definition
        num_tokens = slots_T.shape[0]
        addresses_T = self._addresses_LT[layer]
        cache.write(addresses_T, entries_TF)
        self.written.append((addresses_T, entries_TF))
        size, kv_heads = definition.head_dim, definition.num_kv_heads
        context = cache.read(layer, self._pages_TP)
        context_TC2JE = context.view(num_tokens, -1, 2, kv_heads, size)
        found = functional.scaled_dot_product_attention(
            query_THE.view(num_tokens, kv_heads, -1, size),
            context_TC2JE[:, :, 0].transpose(1, 2),
            context_TC2JE[:, :, 1].transpose(1, 2),
            attn_mask=self._mask_T11C,
        )
        return found.reshape(num_tokens, -1)


class PrefillAttention:
    """Prompts, or the next part of each, one after the other in one row of tokens."""

    def __init__(
        self,
        definition: DecoderDefinition,
        cache: KvCache,
        rotary: Rotary,
        *,
        slots: Sequence[int],
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
    ) -> None:
        """Prepare a pass over the prompts of `slots`, `lengths` tokens each.

        Args:
            definition: the model.
            cache: where keys and values are.
            rotary: position embedding.
            slots: the slot of each prompt.
            lengths: tokens of each that this pass reads.
            starts: tokens of each that earlier passes have read; none unless given.
        """
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._definition = definition
        self._cache = cache
        self._lengths = list(lengths)
        self._starts = [0] * len(self._lengths) if starts is None else list(starts)
        self._prompt_slots = list(slots)
        device = cache.entries.device
        counts = torch.tensor(self._lengths, dtype=torch.int64, device=device)
        self.slots = torch.tensor(list(slots), dtype=torch.int64, device=device)
        self.slots = self.slots.repeat_interleave(counts)
        first = torch.tensor(self._starts, dtype=torch.int64, device=device)
        shift_T = (counts.cumsum(0) - counts - first).repeat_interleave(counts)
        positions_T = torch.arange(len(self.slots), device=device) - shift_T
        self._rotation_T2E = rotary.at(positions_T)
        self._addresses_T = cache.addresses(self.slots, positions_T)

    def rotation(self, slots_T: torch.Tensor) -> torch.Tensor:
        """(T, 2, E) cosines and signed sines."""
        del slots_T  # tokens do not move while prompts are read
        return self._rotation_T2E

    def attend(
        self, layer: int, slots_T: torch.Tensor, query_THE: torch.Tensor, entries_TF: torch.Tensor
    ) -> torch.Tensor:
        """Write, and attend causally within each prompt; what was read before is in the cache."""
        del slots_T
        addresses_T = self._addresses_T + layer * self._cache.num_tokens
        self._cache.write(addresses_T, entries_TF)
        self.written.append((addresses_T, entries_TF))
        parts = zip(
            torch.split(query_THE, self._lengths),
            torch.split(entries_TF, self._lengths),
            strict=True,
        )
        found = [
            self._attend_prompt(query, self._context(layer, number, entries))
            for number, (query, entries) in enumerate(parts)
        ]
        return torch.cat(found) if found else query_THE.flatten(1)

    def _context(self, layer: int, number: int, entries_TF: torch.Tensor) -> torch.Tensor:
        """(C, F) keys and values of a prompt up to the end of this pass."""
        start = self._starts[number]
        if start == 0:
            return entries_TF
        length = start + len(entries_TF)
        pages = self._cache.page_table[self._prompt_slots[number], : pages_for(length)]
        return self._cache.read(layer, pages[None])[0, :length]

    def _attend_prompt(self, query_THE: torch.Tensor, entries_CF: torch.Tensor) -> torch.Tensor:
        definition = self._definition
        size, kv_heads = definition.head_dim, definition.num_kv_heads
        group = definition.num_heads // kv_heads
        heads_C2JE = entries_CF.view(-1, 2, kv_heads, size)
        heads_2HCE = heads_C2JE.permute(1, 2, 0, 3).repeat_interleave(group, dim=1)
        is_whole = len(query_THE) == len(entries_CF)
        found_HTE = functional.scaled_dot_product_attention(
            query_THE.transpose(0, 1)[None],
            heads_2HCE[:1],
            heads_2HCE[1:],
            attn_mask=None if is_whole else _seen(len(query_THE), entries_CF),
            is_causal=is_whole,
        )[0]
        return found_HTE.transpose(0, 1).reshape(len(query_THE), -1)


def _seen(num_queries: int, entries_CF: torch.Tensor) -> torch.Tensor:
    """Bool (T, C): the last `num_queries` positions see themselves and what is before."""
    length = len(entries_CF)
    context = torch.arange(length, device=entries_CF.device)
    return context <= context[length - num_queries :, None]
