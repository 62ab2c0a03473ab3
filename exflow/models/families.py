"""The families the runtime knows, by the `model_type` of their configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from exflow.errors import CheckpointError
from exflow.models import (
    deepseek_v2,
    deepseek_v3,
    gpt_moe,
    gpt_oss,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from placement.json_text import JsonError, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from exflow.models.definition import DecoderDefinition

FAMILIES: dict[str, Callable[[Any, Path, str], DecoderDefinition]] = {
    "deepseek_v2": deepseek_v2.define,
    "deepseek_v3": deepseek_v3.define,
    gpt_moe.MODEL_TYPE: gpt_moe.define,
    "gpt_oss": gpt_oss.define,
    "mixtral": mixtral.define,
    "olmoe": olmoe.define,
    "qwen2_moe": qwen2_moe.define,
    "qwen3_moe": qwen3_moe.define,
}


def define_model(folder: str | Path, *, name: str | None = None) -> DecoderDefinition:
    """Read the configuration of a checkpoint.

    Args:
        folder: where `config.json` is.
        name: the model's name; default the folder's.

    Raises:
        CheckpointError: it cannot be read, or is of a family the runtime does not know.
    """
    path = Path(folder)
    model_type = model_type_of(path)
    if model_type not in FAMILIES:
        msg = (
            f"{path}: the runtime does not know the architecture {model_type!r}; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
        raise CheckpointError(msg)
    try:
        config = _read_config(path, model_type)
        return FAMILIES[model_type](config, path, name or path.resolve().name)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError) as error:
        msg = f"{path}/config.json lacks what a {model_type} model needs: {error}"
        raise CheckpointError(msg) from error
    except (ValueError, StrictDataclassError) as error:
        msg = f"{path}/config.json is not of a {model_type} model: {' '.join(str(error).split())}"
        raise CheckpointError(msg) from error


def _read_config(folder: Path, model_type: str) -> Any:
    if model_type == gpt_moe.MODEL_TYPE:
        return gpt_moe.read_config(folder)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def model_type_of(folder: Path) -> str:
    """The `model_type` of a checkpoint's configuration.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / "config.json"
    try:
        config = parse_json(path.read_bytes())
    except (OSError, JsonError) as error:
        msg = f"{path} cannot be read as a model's configuration: {error}"
        raise CheckpointError(msg) from error
    return str(config.get("model_type")) if isinstance(config, dict) else "unknown"
