"""Running a batch through the model, teacher-forced or decoding, and keeping its tokens' routing.

Shapes: B texts in the batch, S the padded length, N new tokens, T = B * S rows of a forward pass,
L MoE layers, K experts a token. Padding is never recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from exflow.models.foretelling import begin_token
from placement.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from exflow.profiling.batches import Batch
    from exflow.profiling.recorder import Routing, RoutingRecorder

Mode = Literal["teacher-forced", "decode"]
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class RecordedTokens:
    """Tokens of a batch that were recorded.

    Attributes:
        text: int64 (tokens,), the token's text by its place in the batch.
        positions: int32 (tokens,), its position in that text.
        expert_ids: int16 (tokens, L, K).
        expert_weights: float16 (tokens, L, K).
        token_ids: int64 (tokens,), the tokens themselves.
    """

    text: NDArray[np.int64]
    positions: NDArray[np.int32]
    expert_ids: NDArray[np.int16]
    expert_weights: NDArray[np.float16]
    token_ids: NDArray[np.int64]


@torch.inference_mode()
def run_teacher_forced(
    model: PreTrainedModel, recorder: RoutingRecorder, batch: Batch
) -> RecordedTokens:
    """One forward pass over the texts, padded on the right; every token is recorded."""
    input_ids_BS, is_text_BS = _padded(batch, side="right")
    model.base_model(
        input_ids=input_ids_BS.to(model.device),
        attention_mask=is_text_BS.long().to(model.device),
        use_cache=False,
    )
    position_BS = torch.arange(input_ids_BS.shape[1]).expand_as(input_ids_BS)
    return _kept(recorder.take(), [is_text_BS], [position_BS], [input_ids_BS])


@torch.inference_mode()
def run_decode(
    model: PreTrainedModel, recorder: RoutingRecorder, batch: Batch, *, new_tokens: int
) -> RecordedTokens:
    """Greedy decoding from the texts as prompts, padded on the left.

    The pass that feeds new token i records it; the prompts' own pass (prefill) is dropped, and so
    is a text's every pass from its end-of-text token on.
    """
    input_ids_BS, is_text_BS = _padded(batch, side="left")
    ends = _end_tokens(model)
    fed_BN = _decode(model, input_ids_BS, is_text_BS, ends=ends, new_tokens=new_tokens)
    has_ended_BN = torch.isin(fed_BN, torch.tensor(ends, dtype=torch.long)).cumsum(dim=1) > 0
    position_BN = is_text_BS.sum(dim=1, keepdim=True) + torch.arange(fed_BN.shape[1])
    return _kept(
        recorder.take(),
        [torch.zeros_like(is_text_BS), *(~has_ended_BN).unbind(dim=1)],
        [is_text_BS, *position_BN.unbind(dim=1)],
        [input_ids_BS, *fed_BN.unbind(dim=1)],
    )


@torch.inference_mode()
def foretell(
    model: PreTrainedModel, recorder: RoutingRecorder, token_ids: NDArray[np.int64]
) -> NDArray[np.int16]:
    """(T, K) what the first MoE layer chooses for tokens with the beginning of a text before them.

    See `exflow.runtime.opening`, which finds the same for the runtime.
    """
    tokens_T = torch.from_numpy(token_ids)
    ids_T2 = torch.stack([torch.full_like(tokens_T, _begin_token(model)), tokens_T], dim=1)
    parts = [
        recorder.first_layer(
            partial(model.base_model, input_ids=part.to(model.device), use_cache=False)
        )
        for part in torch.split(ids_T2, TOKENS_AT_ONCE)
    ]
    return torch.cat(parts)[1::2].numpy()


def _decode(
    model: Any,
    input_ids_BS: torch.Tensor,
    is_text_BS: torch.Tensor,
    *,
    ends: list[int],
    new_tokens: int,
) -> torch.Tensor:
    """(B, N) the greedy tokens that were fed back; the last one sampled never is."""
    from transformers import GenerationConfig

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens + 1,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    output: torch.Tensor = model.generate(
        input_ids=input_ids_BS.to(model.device),
        attention_mask=is_text_BS.long().to(model.device),
        generation_config=config,
    )
    return output[:, input_ids_BS.shape[1] : -1].cpu()


def _kept(
    passes: list[Routing],
    masks: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    token_ids: Sequence[torch.Tensor],
) -> RecordedTokens:
    """The rows of each pass that its (B, S) mask keeps, with text, position and token."""
    rows = [len(routing.expert_ids) for routing in passes]
    if rows != [mask.numel() for mask in masks]:
        msg = f"expected passes of {[mask.numel() for mask in masks]} tokens, recorded {rows}"
        raise UserError(msg)
    ids, weights, text, position, token = [], [], [], [], []
    for routing, mask, position_BS, token_ids_BS in zip(
        passes, masks, positions, token_ids, strict=True
    ):
        keep = mask.flatten().bool()
        ids.append(routing.expert_ids[keep])
        weights.append(routing.expert_weights[keep])
        text.append(mask.bool().nonzero()[:, 0])
        position.append(position_BS.flatten()[keep])
        token.append(token_ids_BS.flatten()[keep])
    return RecordedTokens(
        text=torch.cat(text).numpy(),
        positions=torch.cat(position).numpy().astype(np.int32),
        expert_ids=torch.cat(ids).numpy(),
        expert_weights=torch.cat(weights).numpy(),
        token_ids=torch.cat(token).numpy(),
    )


def _padded(batch: Batch, *, side: Literal["left", "right"]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) token ids, padded with token 0, and where they are text."""
    width = max(len(text.token_ids) for text in batch.texts)
    input_ids = torch.zeros(len(batch.texts), width, dtype=torch.long)
    is_text = torch.zeros(len(batch.texts), width, dtype=torch.bool)
    for row, text in enumerate(batch.texts):
        length = len(text.token_ids)
        place = slice(0, length) if side == "right" else slice(width - length, width)
        input_ids[row, place] = torch.tensor(text.token_ids)
        is_text[row, place] = True
    return input_ids, is_text


def vocabulary_of(model: PreTrainedModel) -> int:
    """Tokens a model has embeddings of."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]


def _begin_token(model: PreTrainedModel) -> int:
    bos = model.config.get_text_config().bos_token_id
    return begin_token(bos, _end_tokens(model), vocabulary_of(model))


def _end_tokens(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]
