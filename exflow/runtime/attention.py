"""Attention over the paged cache: one token of many sequences, or whole prompts.

Shape suffixes: S slots, T tokens, P pages, C tokens of context, H query heads, J key-value heads,
G query heads a key-value head, E width of a key, F elements the cache keeps of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from exflow.models.parts import LatentAttention
from exflow.runtime.cpu_kernels import attend_pages, is_little
from exflow.runtime.kv_cache import PAGE_SIZE, pages_for
from exflow.runtime.masked_attention import added, attend, keys_and_values, seen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.kv_cache import KvCache


ALL = 1 << 62
NO_SINKS = torch.empty(0)
Written: TypeAlias = tuple[torch.Tensor, torch.Tensor]


class Attention(Protocol):
    """The attention of one forward pass.

    Attributes:
        written: (addresses, entries) of the keys and values stored last; None before the first.
    """

    written: Written | None

    def rotation(self, slots_T: torch.Tensor) -> torch.Tensor | None:
        """(T, 2, E) cosines, and sines with their signs, for the tokens' positions."""

    def positions(self, slots_T: torch.Tensor) -> torch.Tensor:
        """(T,) the tokens' positions."""

    def attend(
        self,
        layer: int,
        slots_T: torch.Tensor,
        query_THE: torch.Tensor,
        entries_TF: torch.Tensor,
        *,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store what the cache keeps of the tokens; (T, H * E) what their queries find."""


class Rotary:
    """The cosines and sines of rotary position embedding."""

    def __init__(
        self, definition: DecoderDefinition, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        rope = definition.rope
        self.frequencies = None
        if rope is not None:
            self.frequencies = torch.tensor(
                rope.frequencies * 2, dtype=torch.float32, device=device
            )
            self.signs = torch.ones_like(self.frequencies)
            self.signs[: len(rope.frequencies)] = -1
            self.scaling = rope.scaling
        self.dtype = dtype

    def at(self, positions_T: torch.Tensor) -> torch.Tensor | None:
        """(T, 2, E) cosines and signed sines; None where positions are learned."""
        if self.frequencies is None:
            return None
        angles = positions_T[:, None].float() * self.frequencies
        turns = torch.stack([angles.cos(), angles.sin() * self.signs], dim=1)
        return (turns * self.scaling).to(self.dtype)


def rotate(heads_THE: torch.Tensor, rotation_T2E: torch.Tensor | None) -> torch.Tensor:
    """Turn each half-pair of a head by its angle."""
    if rotation_T2E is None:
        return heads_THE
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
            longest: none of these positions that are in use is above it.
        """
        self.written: Written | None = None
        self._definition = definition
        self._cache = cache
        attention = definition.attention
        self._scale = attention.scale
        self._query_shape = (attention.num_kv_heads, -1, attention.key_dim)
        self._dtype = rotary.dtype
        slots_S = torch.arange(len(positions_S), device=positions_S.device)
        num_pages = longest // PAGE_SIZE + 1
        self._positions_S = positions_S
        self._masks_SC: dict[int | None, torch.Tensor] = {}
        self._rotation_S2E = rotary.at(positions_S)
        self._addresses_S = cache.addresses(slots_S, positions_S)
        self._pages_SP = cache.page_table[:, :num_pages]
        layers = torch.arange(definition.num_layers, device=positions_S.device)
        self._layer_starts = layers[:, None] * cache.num_tokens
        self._slots: torch.Tensor | None = None

    def positions(self, slots_T: torch.Tensor) -> torch.Tensor:
        """(T,) the tokens' positions."""
        return self._positions_S.index_select(0, slots_T)

    def rotation(self, slots_T: torch.Tensor) -> torch.Tensor | None:
        """(T, 2, E) cosines and signed sines."""
        if slots_T is not self._slots:
            self._slots = slots_T
            turns = self._rotation_S2E
            self._rotation_T2E = None if turns is None else turns.index_select(0, slots_T)
            self._addresses_T = self._addresses_S.index_select(0, slots_T)
            self._addresses_LT = self._layer_starts + self._addresses_T
            self._pages_TP = self._pages_SP.index_select(0, slots_T)
            self._positions_T = self._positions_S.index_select(0, slots_T)
            self._masks_T11C: dict[int | None, torch.Tensor] = {}
        return self._rotation_T2E

    def attend(
        self,
        layer: int,
        slots_T: torch.Tensor,
        query_THE: torch.Tensor,
        entries_TF: torch.Tensor,
        *,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write, gather pages, and attend with a mask over what the token does not see."""
        self.rotation(slots_T)
        num_tokens = slots_T.shape[0]
        self.written = self._addresses_LT[layer], entries_TF
        if is_little(query_THE, 2 * query_THE.numel() * self._pages_TP.shape[1] * PAGE_SIZE):
            return self._attend_in_place(layer, query_THE, entries_TF, sinks_H)
        cache, definition = self._cache, self._definition
        cache.write(*self.written)
        keys, values = keys_and_values(cache.read(layer, self._pages_TP), definition.attention)
        found = attend(
            query_THE.view(num_tokens, *self._query_shape),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            mask=self._mask(definition.windows[layer]),
            scale=self._scale,
            sinks=None if sinks_H is None else sinks_H.view(self._query_shape[0], -1, 1),
        )
        return found.reshape(num_tokens, -1)

    def _mask(self, window: int | None) -> torch.Tensor:
        """(T, 1, 1, C) of these tokens and this window."""
        if window not in self._masks_SC:
            positions_S = self._positions_S
            context = torch.arange(self._pages_SP.shape[1] * PAGE_SIZE, device=positions_S.device)
            self._masks_SC[window] = added(seen(positions_S, context, window), self._dtype)
        if window not in self._masks_T11C:
            assert self._slots is not None
            self._masks_T11C[window] = self._masks_SC[window].index_select(0, self._slots)[
                :, None, None
            ]
        return self._masks_T11C[window]

    def _attend_in_place(
        self,
        layer: int,
        query_THE: torch.Tensor,
        entries_TF: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write and attend by one kernel, which reads keys and values where they are."""
        num_tokens, num_heads, width = query_THE.shape
        attention, window = self._definition.attention, self._definition.windows[layer]
        is_latent = isinstance(attention, LatentAttention)
        found_THE = torch.empty((num_tokens, num_heads, width))
        attend_pages(
            query_THE.numpy(),
            entries_TF.numpy(),
            self._cache.entries.numpy(),
            layer * self._cache.num_tokens,
            self._addresses_T.numpy(),
            self._pages_TP.numpy(),
            PAGE_SIZE,
            self._positions_T.numpy(),
            ALL if window is None else window,
            attention.num_kv_heads,
            0 if is_latent else attention.num_kv_heads * width,
            self._scale,
            (NO_SINKS if sinks_H is None else sinks_H).numpy(),
            found_THE.numpy(),
        )
        return found_THE.flatten(1)


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
        self.written: Written | None = None
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
        self._positions_T = positions_T
        self._rotation_T2E = rotary.at(positions_T)
        self._addresses_T = cache.addresses(self.slots, positions_T)

    def positions(self, slots_T: torch.Tensor) -> torch.Tensor:
        """(T,) the tokens' positions."""
        del slots_T  # tokens do not move while prompts are read
        return self._positions_T

    def rotation(self, slots_T: torch.Tensor) -> torch.Tensor | None:
        """(T, 2, E) cosines and signed sines."""
        del slots_T
        return self._rotation_T2E

    def attend(
        self,
        layer: int,
        slots_T: torch.Tensor,
        query_THE: torch.Tensor,
        entries_TF: torch.Tensor,
        *,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write, and attend causally within each prompt; what was read before is in the cache."""
        del slots_T
        addresses_T = self._addresses_T + layer * self._cache.num_tokens
        self._cache.write(addresses_T, entries_TF)
        self.written = addresses_T, entries_TF
        parts = zip(
            torch.split(query_THE, self._lengths),
            torch.split(entries_TF, self._lengths),
            strict=True,
        )
        found = [
            self._attend_prompt(layer, query, self._context(layer, number, entries), sinks_H)
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

    def _attend_prompt(
        self,
        layer: int,
        query_THE: torch.Tensor,
        entries_CF: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        attention, window = self._definition.attention, self._definition.windows[layer]
        num_queries, length = len(query_THE), len(entries_CF)
        keys, values = (
            heads_CJE.transpose(0, 1).repeat_interleave(
                attention.num_heads // attention.num_kv_heads, dim=0
            )
            for heads_CJE in keys_and_values(entries_CF, attention)
        )
        is_causal = num_queries == length and sinks_H is None and (window or length) >= length
        mask = None
        if not is_causal:
            context = torch.arange(length, device=entries_CF.device)
            is_seen = seen(context[length - num_queries :], context, window)
            mask = added(is_seen, query_THE.dtype)
        found_HTE = attend(
            query_THE.transpose(0, 1)[None],
            keys[None],
            values[None],
            mask=mask,
            scale=attention.scale,
            sinks=None if sinks_H is None else sinks_H.view(-1, 1, 1),
        )[0]
        return found_HTE.transpose(0, 1).reshape(num_queries, -1)
