"""The gate: which experts a token uses, and how much each counts.

Shape suffixes: T tokens, D hidden size, X experts, G groups of experts, K experts a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from exflow.runtime.cpu_kernels import choose_experts, is_little
from exflow.runtime.experts import linear

if TYPE_CHECKING:
    from exflow.models.parts import Router
    from exflow.runtime.weights import RouterWeights


def route(
    router: Router, weights: RouterWeights, normed_TD: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) the experts of each token, by falling gate weight; the weights in float32."""
    rows_TD = normed_TD.float() if router.is_float32 else normed_TD
    logits_TX = linear(rows_TD, weights.weight, weights.bias)
    is_plain = weights.correction is None and router.num_groups == 1
    if is_plain and router.score == "softmax" and is_little(normed_TD, logits_TX.numel()):
        return _choose_plainly(router, logits_TX, top_k)
    scores_TX = _scores(router, logits_TX)
    if is_plain:
        chosen_TK, expert_ids_TK = scores_TX.topk(top_k, dim=-1)
    else:
        chosen_TK, expert_ids_TK = _choose_restricted(router, weights, scores_TX, top_k)
    if router.score == "softmax_chosen":
        chosen_TK = torch.softmax(chosen_TK, dim=-1)
    if router.is_normalized:
        chosen_TK = chosen_TK / chosen_TK.sum(dim=-1, keepdim=True)
    if router.scale != 1.0:
        chosen_TK = chosen_TK * router.scale
    return expert_ids_TK, chosen_TK.to(normed_TD.dtype).float()


def _choose_plainly(
    router: Router, logits_TX: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) experts and weights by one kernel."""
    expert_ids_TK = torch.empty((len(logits_TX), top_k), dtype=torch.int64)
    weights_TK = torch.empty((len(logits_TX), top_k))
    choose_experts(
        logits_TX.numpy(),
        router.is_normalized,
        router.scale,
        expert_ids_TK.numpy(),
        weights_TK.numpy(),
    )
    return expert_ids_TK, weights_TK


def _scores(router: Router, logits_TX: torch.Tensor) -> torch.Tensor:
    if router.score == "softmax":
        return torch.softmax(logits_TX, dim=-1, dtype=torch.float32)
    return logits_TX.float().sigmoid() if router.score == "sigmoid" else logits_TX


def _choose_restricted(
    router: Router, weights: RouterWeights, scores_TX: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) scores and experts: the best by corrected score, of the best groups only."""
    wanted_TX = scores_TX if weights.correction is None else scores_TX + weights.correction
    if router.num_groups > 1:
        wanted_TX = wanted_TX.masked_fill(~_is_in_best_groups(router, wanted_TX), float("-inf"))
    expert_ids_TK = wanted_TX.topk(top_k, dim=-1).indices
    chosen_TK, order_TK = scores_TX.gather(1, expert_ids_TK).sort(dim=-1, descending=True)
    return chosen_TK, expert_ids_TK.gather(1, order_TK)


def _is_in_best_groups(router: Router, wanted_TX: torch.Tensor) -> torch.Tensor:
    """Bool (T, X)."""
    num_tokens, num_experts = wanted_TX.shape
    grouped = wanted_TX.view(num_tokens, router.num_groups, num_experts // router.num_groups)
    num_best = 2 if router.group_score == "best_two" else 1
    scores_TG = grouped.topk(num_best, dim=-1).values.sum(dim=-1)
    groups = scores_TG.topk(router.top_groups, dim=-1).indices
    is_best_TG = torch.zeros_like(scores_TG, dtype=torch.bool).scatter_(1, groups, value=True)
    return is_best_TG.repeat_interleave(grouped.shape[-1], dim=-1)
