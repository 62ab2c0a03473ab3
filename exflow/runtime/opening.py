"""Where tokens start a decode step: where the experts are that the first MoE layer will choose.

Which those are is known but for the context: a token that stands alone goes through the layers up to
that gate, and chooses. So it is settled once for the whole vocabulary, from the weights, each rank
taking a share. Shape suffixes: V vocabulary, T tokens, K experts a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from exflow.runtime.attention import DecodeAttention
from exflow.runtime.kv_cache import KvCache
from placement.rules import first_owner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from exflow.runtime.attention import Rotary
    from exflow.runtime.decoder import Decoder
    from exflow.runtime.ranks import Ranks
    from placement.plan import PlacementPlan

TOKENS_AT_ONCE = 1024


class Opening:
    """The experts foretold for every token of the vocabulary, and a plan's ranks for them."""

    def __init__(
        self,
        decoder: Decoder,
        rotary: Rotary,
        plan: PlacementPlan,
        ranks: Ranks,
        *,
        coherence_domain: int | None,
    ) -> None:
        """Nothing is foretold yet.

        Args:
            decoder: the model.
            rotary: its position embedding.
            plan: where experts are.
            ranks: this rank.
            coherence_domain: ranks that share keys and values; None: all.
        """
        self._decoder = decoder
        self._rotary = rotary
        self._ranks = ranks
        self._hosts = plan.hosts()[0].astype(np.int64)
        self._node_of_rank = plan.topology.node_of_rank
        self._domain_of_rank = plan.topology.domain_of_rank(coherence_domain)
        self._foretold_VK: NDArray[np.int16] | None = None

    def prepare(self) -> None:
        """Foretell, each rank for its share of the vocabulary, once; every rank must ask."""
        if self._foretold_VK is not None:
            return
        embedding = self._decoder.weights.embedding
        vocabulary = torch.arange(len(embedding), device=embedding.device)
        share = vocabulary.tensor_split(self._ranks.num_ranks)[self._ranks.rank]
        mine = foretell(self._decoder, self._rotary, share).to(torch.int16).cpu()
        parts = self._ranks.gather_arrays(mine.flatten().view(torch.uint8), embedding.device)
        foretold = torch.cat(parts).view(torch.int16)
        self._foretold_VK = foretold.view(-1, self._decoder.definition.top_k).numpy()

    def foretold(self, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int16]:
        """(T, K) what the first MoE layer's gate would choose for tokens that stand alone."""
        assert self._foretold_VK is not None, "not prepared"
        return self._foretold_VK[token_ids]

    def owners(self, token_ids: Sequence[int], homes: Sequence[int]) -> list[int]:
        """The first owner of each token, from the home of its request."""
        owners: list[int] = first_owner(
            self._hosts,
            self.foretold(token_ids).astype(np.int64),
            np.array(homes, dtype=np.int64),
            self._node_of_rank,
            self._domain_of_rank,
        ).tolist()
        return owners


@torch.inference_mode()
def foretell(decoder: Decoder, rotary: Rotary, token_ids_T: torch.Tensor) -> torch.Tensor:
    """(T, K) what the first MoE layer's gate chooses for tokens that stand alone, by falling weight."""
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
    attention = DecodeAttention(
        definition, cache, rotary, positions_S=torch.zeros_like(slots_T), longest=0
    )
    hidden_TD = decoder.embed(token_ids_T)
    for layer in range(first_moe + 1):
        hidden_TD = decoder.attend(layer, hidden_TD, slots_T, attention)
        if layer < first_moe:
            hidden_TD = decoder.dense(layer, hidden_TD)
    expert_ids_TK, _ = decoder.route(first_moe, decoder.post_norm(first_moe, hidden_TD))
    return expert_ids_TK
