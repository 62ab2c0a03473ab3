"""Requests, how to sample their tokens, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from placement.errors import UserError

FinishReason = Literal["stop", "length", "refused"]


class SamplingError(UserError):
    """Sampling parameters that make no sense."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: only the so many likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability.
        seed: with the request's index it settles every random choice.
        max_new_tokens: tokens after which a request ends.
        ignore_eos: go on after an end token, up to max_new_tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 64
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "max_new_tokens": self.max_new_tokens >= 1,
        }
        expected = {
            "temperature": "at least 0",
            "top_k": "at least 0 (0 for all)",
            "top_p": "above 0 and at most 1",
            "max_new_tokens": "at least 1",
        }
        for name, holds in bounds.items():
            if not holds:
                msg = f"{name} must be {expected[name]}, got {getattr(self, name)}"
                raise SamplingError(msg)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt.

    Attributes:
        index: its number in the job; its home is rank `index % num_ranks`.
        id: the user's name for it.
        prompt: text, if there is one.
        token_ids: the prompt's tokens.
    """

    index: int
    id: Any
    prompt: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished request.

    Attributes:
        request: the request.
        token_ids: the new tokens, the one that ended the text included.
        finish_reason: "stop" at an end token, "length", or "refused".
        reason: why it was refused.
    """

    request: Request
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    reason: str = ""
