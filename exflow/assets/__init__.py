"""The models that come with ExFlow, and what a MODEL argument may be."""

from __future__ import annotations

import re
from pathlib import Path

from exflow.errors import CheckpointError

BUNDLED_MODELS = ("pile-moe-top1", "pile-moe-top4")

_ASSETS = Path(__file__).parent
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(name_or_path: str) -> str:
    """Finds the checkpoint that a MODEL argument means.

    Args:
        name_or_path: A bundled model's name, a local folder, or a hub id (`organisation/name`).

    Returns:
        The folder of the checkpoint, or the hub id unchanged.

    Raises:
        CheckpointError: It is none of the three.
    """
    if name_or_path in BUNDLED_MODELS:
        return str(_checked(_ASSETS / name_or_path))
    folder = Path(name_or_path).expanduser()
    if folder.exists():
        return str(_checked(folder))
    if _HUB_ID.fullmatch(name_or_path):
        return name_or_path
    message = (
        f"no model {name_or_path!r}: expected a bundled model ({', '.join(BUNDLED_MODELS)}), "
        "a folder with config.json, or a hub id such as organisation/name"
    )
    raise CheckpointError(message)


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        message = f"{folder} is not a checkpoint: it has no config.json; name the folder that does"
        raise CheckpointError(message)
    return folder
