"""A plan as lookup tables on the device, and the rules of `placement.rules` by them.

A *choice* is one number for a (rank, logical expert) pair: rank * E + expert.
Shape suffixes: T tokens, K experts a token, E logical experts, L MoE layers, W ranks, J ranks of a
node.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from exflow.runtime.experts import is_known
from placement.compiled_rules import CompiledRules
from placement.rules import choose_ranks, next_owner

if TYPE_CHECKING:
    from placement.plan import PlacementPlan


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank among the ranks and nodes of a job.

    Attributes:
        rank: the rank.
        num_ranks: W.
        ranks_per_node: J; 1 in flat dispatch, where nodes do not count.
    """

    rank: int
    num_ranks: int
    ranks_per_node: int

    @property
    def node(self) -> slice:
        """The ranks of this node."""
        first = self.rank - self.rank % self.ranks_per_node
        return slice(first, first + self.ranks_per_node)

    def node_of_rank(self, device: torch.device) -> torch.Tensor:
        """(W,) nodes."""
        return torch.arange(self.num_ranks, device=device) // self.ranks_per_node


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementTables:
    """What one rank has to know of a plan.

    Attributes:
        rank: this rank.
        num_ranks: W.
        num_experts: E.
        top_k: K.
        hosts: int64 (L, E, W), 1 where a rank holds a copy.
        has_copies: by layer, whether an expert has several copies.
        fixed_choice: by layer, (E,) the choice for each expert of a token this rank owns; None
            where it depends on the token's other experts.
        slot_of_choice: (L, W * E) this rank's slot for a choice, -1 if it is another rank's.
        node_of_rank: (W,).
        domain_of_rank: (W,) coherence domains.
        outlook: int64 (L, E, W) of the plan, or None.
        compiled: the same rules for a CPU; None on GPUs and for more ranks than they can count.
    """

    rank: int
    num_ranks: int
    num_experts: int
    top_k: int
    hosts: torch.Tensor
    has_copies: tuple[bool, ...]
    fixed_choice: tuple[torch.Tensor | None, ...]
    slot_of_choice: torch.Tensor
    node_of_rank: torch.Tensor
    domain_of_rank: torch.Tensor
    outlook: torch.Tensor | None
    compiled: CompiledRules | None

    @classmethod
    def from_plan(
        cls,
        plan: PlacementPlan,
        rank: int,
        *,
        top_k: int,
        coherence_domain: int | None,
        device: torch.device,
    ) -> PlacementTables:
        """The tables of `rank`, with domains of `coherence_domain` ranks (None: all ranks)."""
        hosts = torch.from_numpy(plan.hosts().astype(np.int64))
        experts = torch.arange(plan.num_experts)
        slot_of_choice = torch.full((plan.num_layers, plan.num_ranks * plan.num_experts), -1)
        fixed_choice: list[torch.Tensor | None] = []
        has_copies = [count > plan.num_experts for count in hosts.sum(dim=(1, 2)).tolist()]
        owner = np.full(plan.num_experts, rank)
        node_of_rank = plan.topology.node_of_rank
        ranks_alone = [
            torch.from_numpy(
                choose_ranks(of_layer, experts.numpy()[:, None], owner, node_of_rank)[:, 0]
            )
            for of_layer in hosts.numpy()
        ]
        for layer, ranks in enumerate(plan.slots):
            mine = torch.tensor(ranks[rank], dtype=torch.int64)
            slot_of_choice[layer, rank * plan.num_experts + mine] = torch.arange(len(mine))
            is_fixed = top_k == 1 or not has_copies[layer]
            choice = ranks_alone[layer] * plan.num_experts + experts
            fixed_choice.append(choice.to(device) if is_fixed else None)
        domains = torch.from_numpy(plan.topology.domain_of_rank(coherence_domain))
        outlook = plan.outlook_table()
        compiled = None
        if device.type == "cpu" and CompiledRules.can_have(plan.num_ranks):
            compiled = CompiledRules(plan, coherence_domain=coherence_domain)
        return cls(
            rank=rank,
            num_ranks=plan.num_ranks,
            num_experts=plan.num_experts,
            top_k=top_k,
            hosts=hosts.to(device),
            has_copies=tuple(has_copies),
            fixed_choice=tuple(fixed_choice),
            slot_of_choice=slot_of_choice.to(device),
            node_of_rank=torch.from_numpy(node_of_rank).to(device),
            domain_of_rank=domains.to(device),
            outlook=None if outlook is None else torch.from_numpy(outlook).to(device),
            compiled=compiled,
        )

    def choose(
        self, layer: int, expert_ids_TK: torch.Tensor, owner_T: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(T, K) the choice for each expert of tokens.

        Args:
            layer: index among the MoE layers.
            expert_ids_TK: by falling gate weight.
            owner_T: who owns the tokens; None: this rank.
        """
        fixed = self.fixed_choice[layer]
        if fixed is not None and (owner_T is None or not self.has_copies[layer]):
            return fixed.take(expert_ids_TK)
        if owner_T is None:
            owner_T = self._own(expert_ids_TK)
        ranks_TK: torch.Tensor
        if self.compiled is not None and is_known(expert_ids_TK):
            ranks_TK, _ = self._compiled_route(self.compiled, layer, expert_ids_TK, owner_T)
        else:
            ranks_TK = choose_ranks(self.hosts[layer], expert_ids_TK, owner_T, self.node_of_rank)
        return ranks_TK * self.num_experts + expert_ids_TK

    def route(self, layer: int, expert_ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, K) the choice for each expert of tokens this rank owns, and (T,) their next owners."""
        owner_T = self._own(expert_ids_TK)
        if self.compiled is not None and is_known(expert_ids_TK):
            ranks_TK, next_T = self._compiled_route(self.compiled, layer, expert_ids_TK, owner_T)
            return ranks_TK * self.num_experts + expert_ids_TK, next_T
        choices_TK = self.choose(layer, expert_ids_TK)
        ranks_TK = choices_TK // self.num_experts
        if self.top_k == 1 and self.has_one_domain:
            return choices_TK, ranks_TK[:, 0]
        ahead_TW = None if self.outlook is None else self.outlook[layer][expert_ids_TK].sum(dim=1)
        return choices_TK, next_owner(ranks_TK, owner_T, self.domain_of_rank, ahead_TW)

    def _own(self, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        """(T,) this rank, of tokens it owns."""
        return torch.full_like(expert_ids_TK[:, 0], self.rank)

    @staticmethod
    def _compiled_route(
        compiled: CompiledRules, layer: int, expert_ids_TK: torch.Tensor, owner_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ranks, next_owners = compiled.route(layer, expert_ids_TK.numpy(), owner_T.numpy())
        return torch.from_numpy(ranks), torch.from_numpy(next_owners)

    @cached_property
    def flat_place(self) -> Place:
        """This rank where nodes do not count."""
        return Place(rank=self.rank, num_ranks=self.num_ranks, ranks_per_node=1)

    @cached_property
    def place(self) -> Place:
        """This rank in its node."""
        per_node = int((self.node_of_rank == self.node_of_rank[0]).sum())
        return Place(rank=self.rank, num_ranks=self.num_ranks, ranks_per_node=per_node)

    @cached_property
    def has_one_domain(self) -> bool:
        """Whether a token may be owned by any rank."""
        return len(set(self.domain_of_rank.tolist())) == 1
