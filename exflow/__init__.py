"""ExFlow: affinity-aware expert placement and distributed decode for Mixture-of-Experts models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exflow.llm import LLM
    from exflow.runtime.requests import Completion, NewToken, SamplingParams
    from placement.errors import UserError

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "NewToken", "SamplingParams", "UserError", "__version__"]

_HOMES = {
    "LLM": "exflow.llm",
    "SamplingParams": "exflow.runtime.requests",
    "Completion": "exflow.runtime.requests",
    "NewToken": "exflow.runtime.requests",
    "UserError": "placement.errors",
}


def __getattr__(name: str) -> Any:
    """Loads the public names when they are asked for: torch takes seconds."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
