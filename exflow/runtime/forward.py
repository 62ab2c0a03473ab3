"""The way of tokens through the layers: attention and gate at the owner, experts where they are.

Shape suffixes: T tokens, N rows, K experts a token, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from exflow.runtime.dispatcher import Tokens
from exflow.runtime.experts import run_experts

if TYPE_CHECKING:
    from exflow.runtime.attention import Attention
    from exflow.runtime.decoder import Decoder
    from exflow.runtime.dispatcher import Dispatcher
    from exflow.runtime.metrics import PhaseMetrics
    from exflow.runtime.recorder import DecodeRecorder
    from exflow.runtime.sharing import Sharing


def run_layers(
    decoder: Decoder,
    tokens: Tokens,
    attention: Attention,
    dispatcher: Dispatcher,
    *,
    metrics: PhaseMetrics,
    recorder: DecodeRecorder | None,
    sharing: Sharing | None,
) -> Tokens:
    """Take tokens through all layers; they may end on other ranks.

    Args:
        decoder: the model.
        tokens: where they start.
        attention: the pass's attention.
        dispatcher: brings them to experts.
        metrics: counts of the phase.
        recorder: takes down the routing.
        sharing: brings keys and values to other ranks meanwhile.
    """
    moe_layer = 0
    for layer in range(decoder.definition.num_layers):
        if sharing is not None and sharing.receive(layer):
            metrics.lap("share")
        hidden_TD = decoder.attend(layer, tokens.hidden, tokens.slots, attention)
        if sharing is not None:
            sharing.add(layer, tokens.owned, attention.written if len(hidden_TD) else None)
        if decoder.weights.layers[layer].experts is None:
            hidden_TD = decoder.dense(layer, hidden_TD)
            tokens = Tokens(hidden=hidden_TD, slots=tokens.slots, owned=tokens.owned)
            metrics.lap("attention")
            continue
        metrics.lap("attention")
        tokens = Tokens(hidden=hidden_TD, slots=tokens.slots, owned=tokens.owned)
        tokens = _run_experts(
            decoder, layer, moe_layer, tokens, dispatcher, metrics=metrics, recorder=recorder
        )
        moe_layer += 1
    return tokens


def _run_experts(
    decoder: Decoder,
    layer: int,
    moe_layer: int,
    tokens: Tokens,
    dispatcher: Dispatcher,
    *,
    metrics: PhaseMetrics,
    recorder: DecodeRecorder | None,
) -> Tokens:
    normed_TD = decoder.post_norm(layer, tokens.hidden)
    expert_ids_TK, weights_TK = decoder.route(layer, normed_TD)
    if recorder is not None:
        recorder.add(tokens.slots, expert_ids_TK, weights_TK)
    metrics.lap("gate")
    rows, record = dispatcher.dispatch(moe_layer, tokens, expert_ids_TK, weights_TK)
    metrics.lap("dispatch")
    experts = decoder.weights.layers[layer].experts
    assert experts is not None
    stayed = rows.hidden is tokens.hidden
    normed_ND = normed_TD if stayed else decoder.post_norm(layer, rows.hidden)
    partial_ND = run_experts(experts, normed_ND, rows.expert_slots, rows.weights)
    shared_TD = decoder.shared(layer, dispatcher.residual(record)) if decoder.has_shared else None
    metrics.lap("experts")
    tokens = dispatcher.combine(partial_ND, record)
    if shared_TD is not None:
        tokens = replace(tokens, hidden=tokens.hidden + shared_TD)
    metrics.lap("combine")
    return tokens
