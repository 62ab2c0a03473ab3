"""Where tokens start a decode step: where the experts are that the first MoE layer will choose.

Which those are is known but for the context. So a token goes alone, with only the beginning of a text
before it, through the layers up to the first MoE layer's gate; what that chooses is foretold for it
wherever it comes up. It depends on the weights only and is settled once for the whole vocabulary, each
rank taking a share. Shape suffixes: V vocabulary, T tokens, K experts a token.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from exflow.models.foretelling import begin_token, can_tell_apart, sample_vocabulary
from exflow.runtime.attention import DecodeAttention
from exflow.runtime.kv_cache import KvCache
from placement.rules import first_owner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from exflow.runtime.attention import Rotary
    from exflow.runtime.decoder import Decoder
    from exflow.runtime.ranks import Ranks
    from exflow.runtime.tables import PlacementTables

TOKENS_AT_ONCE = 256

logger = logging.getLogger(__name__)


class Opening:
    """The experts foretold for every token of the vocabulary, and a plan's ranks for them."""

    def __init__(
        self, decoder: Decoder, rotary: Rotary, tables: PlacementTables, ranks: Ranks
    ) -> None:
        """Nothing is foretold yet.

        Args:
            decoder: the model.
            rotary: its position embedding.
            tables: where experts are, and the coherence domains.
            ranks: this rank.
        """
        self._decoder = decoder
        self._rotary = rotary
        self._ranks = ranks
        self._compiled = tables.compiled
        self._hosts: NDArray[np.int64] = tables.hosts[0].cpu().numpy()
        self._node_of_rank: NDArray[np.int64] = tables.node_of_rank.cpu().numpy()
        self._domain_of_rank: NDArray[np.int64] = tables.domain_of_rank.cpu().numpy()
        self._foretold_VK: NDArray[np.int16] | None = None
        self._is_blind = False

    def prepare(self) -> None:
        """Foretell, each rank for its share of the vocabulary, once; every rank must ask.

        Without a context the gate may not tell tokens apart; then tokens start at home.
        """
        if self._foretold_VK is not None:
            return
        device = self._decoder.weights.embedding.device
        shares = np.array_split(np.arange(self._vocabulary), self._ranks.num_ranks)
        mine = torch.from_numpy(self._foretell(shares[self._ranks.rank]))
        parts = self._ranks.gather_arrays(mine.flatten().view(torch.uint8), device)
        foretold = torch.cat(parts).view(torch.int16)
        self._foretold_VK = foretold.view(self._vocabulary, -1).numpy()
        sample = sample_vocabulary(self._vocabulary)
        self._is_blind = not can_tell_apart(self._foretold_VK[sample])
        if self._is_blind and self._ranks.is_first:
            logger.info("tokens start at home: their first experts depend on the context")

    def foretold(self, token_ids: NDArray[np.int64]) -> NDArray[np.int16] | None:
        """(T, K) `RoutingTrace.foretold_ids`; None where the gate does not tell tokens apart.

        Where nothing was prepared only these tokens are foretold, without the other ranks.
        """
        if self._foretold_VK is not None:
            return None if self._is_blind else self._foretold_VK[token_ids]
        if not can_tell_apart(self._foretell(sample_vocabulary(self._vocabulary))):
            return None
        tokens, index = np.unique(token_ids, return_inverse=True)
        return self._foretell(tokens)[index]

    def _foretell(self, token_ids: NDArray[np.int64]) -> NDArray[np.int16]:
        device = self._decoder.weights.embedding.device
        found = foretell(self._decoder, self._rotary, torch.from_numpy(token_ids).to(device))
        return found.to(torch.int16).cpu().numpy()

    @property
    def _vocabulary(self) -> int:
        return len(self._decoder.weights.embedding)

    def owners(self, token_ids: Sequence[int], homes: Sequence[int]) -> list[int]:
        """The first owner of each token, from the home of its request."""
        if self._is_blind:
            return list(homes)
        assert self._foretold_VK is not None, "not prepared"
        foretold_TK, homes_T = self._foretold_VK[token_ids].astype(np.int64), np.array(homes)
        if self._compiled is not None:
            owners_T = self._compiled.first_owner(foretold_TK, homes_T)
        else:
            owners_T = first_owner(
                self._hosts, foretold_TK, homes_T, self._node_of_rank, self._domain_of_rank
            )
        owners: list[int] = owners_T.tolist()
        return owners


@torch.inference_mode()
def foretell(decoder: Decoder, rotary: Rotary, token_ids_T: torch.Tensor) -> torch.Tensor:
    """(T, K) what the first MoE layer's gate chooses for tokens alone, by falling weight."""
    parts = torch.split(token_ids_T, TOKENS_AT_ONCE)
    return torch.cat([_foretell(decoder, rotary, part) for part in parts])


def _foretell(decoder: Decoder, rotary: Rotary, token_ids_T: torch.Tensor) -> torch.Tensor:
    definition, count = decoder.definition, len(token_ids_T)
    first_moe = definition.moe_layer_ids[0]
    cache = KvCache(
        num_layers=first_moe + 1,
        num_pages=count,
        width=definition.kv_width,
        num_slots=count,
        pages_per_slot=1,
        dtype=decoder.weights.embedding.dtype,
        device=token_ids_T.device,
    )
    slots_T = torch.arange(count, device=token_ids_T.device)
    cache.page_table[:, 0] = slots_T
    vocabulary = len(decoder.weights.embedding)
    begin = begin_token(definition.bos_token_id, definition.eos_token_ids, vocabulary)
    _read_begin(decoder, rotary, cache, torch.full_like(token_ids_T[:1], begin))
    attention = _attention(decoder, rotary, cache, position=1)
    hidden_TD = decoder.embed(token_ids_T)
    for layer in range(first_moe):
        hidden_TD = decoder.attend(layer, hidden_TD, slots_T, attention)
        hidden_TD = decoder.dense(layer, hidden_TD)
    hidden_TD = decoder.attend(first_moe, hidden_TD, slots_T, attention)
    expert_ids_TK, _ = decoder.route(first_moe, decoder.post_norm(first_moe, hidden_TD))
    return expert_ids_TK


def _read_begin(decoder: Decoder, rotary: Rotary, cache: KvCache, begin_1: torch.Tensor) -> None:
    """The keys and values of the token before a text, in slot 0, and from there in every slot."""
    first_moe = decoder.definition.moe_layer_ids[0]
    attention = _attention(decoder, rotary, cache, position=0)
    slots_T = torch.arange(len(cache.page_table), device=begin_1.device)
    addresses_T = cache.addresses(slots_T, torch.zeros_like(slots_T))
    hidden_1D = decoder.embed(begin_1)
    for layer in range(first_moe + 1):
        hidden_1D = decoder.attend(layer, hidden_1D, slots_T[:1], attention)
        assert attention.written is not None
        entry_1F = attention.written[1]
        cache.write(addresses_T + layer * cache.num_tokens, entry_1F.expand(len(slots_T), -1))
        if layer < first_moe:
            hidden_1D = decoder.dense(layer, hidden_1D)


def _attention(
    decoder: Decoder, rotary: Rotary, cache: KvCache, *, position: int
) -> DecodeAttention:
    """Of tokens at a position, in every slot."""
    positions_S = torch.full_like(cache.page_table[:, 0], position)
    return DecodeAttention(
        decoder.definition, cache, rotary, positions_S=positions_S, longest=position
    )
