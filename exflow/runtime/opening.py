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

from exflow.runtime.attention import DecodeAttention
from exflow.runtime.kv_cache import KvCache
from placement.rules import first_owner, tells_tokens_apart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.attention import Rotary
    from exflow.runtime.decoder import Decoder
    from exflow.runtime.ranks import Ranks
    from exflow.runtime.tables import PlacementTables

TOKENS_AT_ONCE = 1024

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
        self._tells_nothing = False

    def prepare(self) -> None:
        """Foretell, each rank for its share of the vocabulary, once; every rank must ask.

        Without a context the gate may not tell tokens apart; then tokens start at home.
        """
        if self._foretold_VK is not None:
            return
        embedding = self._decoder.weights.embedding
        vocabulary = torch.arange(len(embedding), device=embedding.device)
        share = vocabulary.tensor_split(self._ranks.num_ranks)[self._ranks.rank]
        mine = foretell(self._decoder, self._rotary, share).to(torch.int16).cpu()
        parts = self._ranks.gather_arrays(mine.flatten().view(torch.uint8), embedding.device)
        foretold = torch.cat(parts).view(torch.int16)
        self._foretold_VK = foretold.view(-1, self._decoder.definition.top_k).numpy()
        self._tells_nothing = not tells_tokens_apart(self._foretold_VK)
        if self._tells_nothing and self._ranks.is_first:
            logger.info("tokens start at home: their first experts depend on the context")

    def foretold(self, token_ids: NDArray[np.int64]) -> NDArray[np.int16] | None:
        """(T, K) what the first MoE layer would choose without a context; None if always the same."""
        if self._tells_nothing:
            return None
        if self._foretold_VK is not None:
            return self._foretold_VK[token_ids]
        device = self._decoder.weights.embedding.device
        tokens, index = np.unique(token_ids, return_inverse=True)
        found = foretell(self._decoder, self._rotary, torch.from_numpy(tokens).to(device))
        return found.to(torch.int16).cpu().numpy()[index]

    def owners(self, token_ids: Sequence[int], homes: Sequence[int]) -> list[int]:
        """The first owner of each token, from the home of its request."""
        if self._tells_nothing:
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


def begin_token(definition: DecoderDefinition) -> int:
    """The token that stands before a text: the beginning of one, else the end of another, else 0."""
    if definition.bos_token_id is not None:
        return definition.bos_token_id
    return definition.eos_token_ids[0] if definition.eos_token_ids else 0


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
    begin_T = torch.full_like(token_ids_T, begin_token(definition))
    for position, ids_T in enumerate((begin_T, token_ids_T)):
        attention = DecodeAttention(
            definition,
            cache,
            rotary,
            positions_S=torch.full_like(slots_T, position),
            longest=position,
        )
        hidden_TD = decoder.embed(ids_T)
        for layer in range(first_moe):
            hidden_TD = decoder.attend(layer, hidden_TD, slots_T, attention)
            hidden_TD = decoder.dense(layer, hidden_TD)
        hidden_TD = decoder.attend(first_moe, hidden_TD, slots_T, attention)
    expert_ids_TK, _ = decoder.route(first_moe, decoder.post_norm(first_moe, hidden_TD))
    return expert_ids_TK
