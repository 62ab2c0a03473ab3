"""The experts of a `transformers` model, placed by a plan: read, and run where their tokens go.

The arithmetic of an expert stays `transformers`': its module keeps its forward, and gets weights
that hold this rank's slots only. Around it, tokens travel by our `HomeDispatcher`: once to every
rank that runs some of their experts, and partial sums back.

Shape suffixes: T tokens of the batch, N rows received, P pairs of a row and a slot, K experts a
token, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from exflow.runtime.dispatcher import HomeDispatcher, Tokens
from exflow.runtime.metrics import PhaseMetrics
from exflow.runtime.rows import RowFormat
from exflow.runtime.tables import PlacementTables
from exflow.runtime.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from exflow.models.definition import DecoderDefinition
    from exflow.runtime.ranks import Ranks
    from exflow.runtime.tensor_reader import TensorReader
    from placement.plan import PlacementPlan

    Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_dispatcher(
    plan: PlacementPlan,
    definition: DecoderDefinition,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> HomeDispatcher:
    """What brings tokens to experts and back; its wire counts the rows."""
    return HomeDispatcher(
        tables=PlacementTables.from_plan(
            plan, ranks.rank, top_k=definition.top_k, coherence_domain=None, device=device
        ),
        format=RowFormat(
            hidden_size=definition.hidden_size,
            top_k=definition.top_k,
            dtype=dtype,
            has_owner=False,
        ),
        wire=Wire(ranks, device, PhaseMetrics(plan.num_layers, plan.num_ranks)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedExperts:
    """The forward of one layer's experts, in place of the module's own.

    Attributes:
        run: the module's own, which knows the slots of this rank.
        layer: index among the MoE layers.
        dispatcher: what all layers share.
        has_shared_batch: whether every rank is given the same tokens; else each has its own.
    """

    run: Experts
    layer: int
    dispatcher: HomeDispatcher
    has_shared_batch: bool

    def __call__(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """(T, D) the experts' gate-weighted sums.

        Args:
            hidden_states: (T, D).
            top_k_index: (T, K) logical experts.
            top_k_weights: (T, K) gate weights.
        """
        if not self.has_shared_batch:  # then nobody knows how many tokens the others have
            return self._sums(hidden_states, top_k_index, top_k_weights, owned=())
        tables, num_tokens = self.dispatcher.tables, len(hidden_states)
        parts = [slice(rank, None, tables.num_ranks) for rank in range(tables.num_ranks)]
        mine = parts[tables.rank]
        sums = self._sums(
            hidden_states[mine],
            top_k_index[mine],
            top_k_weights[mine],
            owned=tuple(len(range(num_tokens)[part]) for part in parts),
        )
        return self._gather(sums, num_tokens)

    def _sums(
        self,
        hidden_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        owned: tuple[int, ...],
    ) -> torch.Tensor:
        """The sums of the tokens whose home is this rank."""
        weights_TK, order_TK = weights_TK.sort(dim=1, descending=True, stable=True)
        nothing = torch.zeros_like(hidden_TD)
        tokens = Tokens(hidden=hidden_TD, slots=hidden_TD.new_empty(0), owned=owned)
        rows, record = self.dispatcher.dispatch(
            self.layer, tokens, expert_ids_TK.gather(1, order_TK).long(), weights_TK
        )
        partial_ND = self._run_rows(rows.hidden, rows.expert_slots, rows.weights)
        # `combine` adds to the residual stream, which `transformers` adds by itself.
        record = replace(record, tokens=replace(tokens, hidden=nothing))
        return self.dispatcher.combine(partial_ND, record).hidden

    def _run_rows(
        self, hidden_ND: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        """Every (row, slot) pair as a token with one expert; sums by row."""
        row_P, choice_P = (slots_NK >= 0).nonzero(as_tuple=True)
        total_ND = torch.zeros_like(hidden_ND)
        if len(row_P) == 0:
            return total_ND
        slots_P1 = slots_NK[row_P, choice_P, None]
        weights_P1 = weights_NK[row_P, choice_P, None].to(hidden_ND.dtype)
        return total_ND.index_add_(0, row_P, self.run(hidden_ND[row_P], slots_P1, weights_P1))

    def _gather(self, sums_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The sums of all tokens on every rank; rank r has tokens r, r + W, r + 2W, ..."""
        dispatcher, num_ranks = self.dispatcher, self.dispatcher.tables.num_ranks
        row_bytes = dispatcher.format.payload_bytes
        homes = [torch.arange(rank, num_tokens, num_ranks) for rank in range(num_ranks)]
        received = dispatcher.wire.exchange_bytes(
            sums_TD.view(torch.uint8).flatten().repeat(num_ranks),
            [row_bytes * len(sums_TD)] * num_ranks,
            [row_bytes * len(home) for home in homes],
        )
        by_home_TD = received.view(sums_TD.dtype).view(num_tokens, -1)
        token_T = torch.cat(homes).to(by_home_TD.device)
        return torch.empty_like(by_home_TD).index_copy_(0, token_T, by_home_TD)


def read_slots(
    reader: TensorReader,
    prefix: str,
    experts: Sequence[int],
    wanted: Mapping[str, torch.Size],
) -> dict[str, torch.Tensor]:
    """These experts, and no others, as `transformers` lays them out.

    Args:
        reader: the checkpoint.
        prefix: of the layer's experts.
        experts: which.
        wanted: the module's parameters with the shape of one expert.

    Returns:
        By parameter, (slots, ...) in the order of `experts`.
    """
    slots = {
        name: torch.empty((len(experts), *shape), dtype=reader.dtype, device=reader.device)
        for name, shape in wanted.items()
    }
    for slot, expert in enumerate(experts):
        for name, shape in wanted.items():
            slots[name][slot] = _read_parameter(reader, prefix, expert, name, shape)
    return slots


def _read_parameter(
    reader: TensorReader, prefix: str, expert: int, name: str, shape: torch.Size
) -> torch.Tensor:
    """One expert's part of a parameter, stored with all the others or by itself."""
    if reader.has(prefix + name):
        return reader.read(prefix + name, tuple(shape), rows=expert)
    names, hidden = reader.definition.weights, reader.definition.hidden_size
    size, below = reader.definition.expert_size, f"{prefix}{expert}."
    if name == "down_proj":
        return reader.linear(below + names.down, hidden, size)
    return torch.cat([reader.linear(below + part, size, hidden) for part in (names.gate, names.up)])
