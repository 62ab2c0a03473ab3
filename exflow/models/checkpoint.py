"""Checkpoint: the tensors of safetensors shards, read only as far as they are asked for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from exflow.errors import CheckpointError
from placement.json_text import JsonError, parse_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLE_BYTES = 1 << 16


def checkpoint_folder(name_or_path: str) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded into the hub's cache.

    Raises:
        CheckpointError: the hub does not give it.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name_or_path,
                allow_patterns=["*.json", "*.safetensors", "*.txt"],
                ignore_patterns=["*/*"],  # the same weights in other formats (gpt-oss, Mixtral)
            )
        )
    except (OSError, ValueError) as error:
        msg = f"{name_or_path} is no local folder, and the hub does not give it: {error}"
        raise CheckpointError(msg) from error


class Checkpoint:
    """Tensors by name. Shards are opened when first needed and parts are read lazily.

    Attributes:
        folder: the checkpoint's folder.
        bytes_read: size of all that was read.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read which tensor is in which shard.

        Raises:
            CheckpointError: there are no safetensors files.
        """
        self.folder = Path(folder)
        self.bytes_read = 0
        self._files: dict[Path, Any] = {}
        self._shard_of = self._read_index()

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def read(self, name: str, rows: int | slice | None = None) -> torch.Tensor:
        """A tensor, or only these rows of it.

        Raises:
            CheckpointError: it is missing or its shard is damaged.
        """
        if name not in self._shard_of:
            msg = f"{self.folder} has no tensor {name!r}; the checkpoint is not complete"
            raise CheckpointError(msg)
        shard = self._shard_of[name]
        try:
            part = self._open(shard).get_slice(name)
            tensor: torch.Tensor = part[:] if rows is None else part[rows]
        except (SafetensorError, OSError) as error:
            msg = f"{shard}: {name!r} cannot be read: {error}"
            raise CheckpointError(msg) from error
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def fingerprint(self) -> str:
        """Tells checkpoints apart by the sizes of their shards, and how each begins and ends.

        Raises:
            CheckpointError: a shard cannot be read.
        """
        digest = hashlib.sha256()
        try:
            for shard in sorted(set(self._shard_of.values())):
                with shard.open("rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    digest.update(f"{shard.name} {size} ".encode())
                    for start in (0, max(0, size - SAMPLE_BYTES)):
                        file.seek(start)
                        digest.update(file.read(SAMPLE_BYTES))
        except OSError as error:
            msg = f"{error.filename} cannot be read: {error.strerror or error}"
            raise CheckpointError(msg) from error
        return digest.hexdigest()

    def _read_index(self) -> dict[str, Path]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.is_file():
            try:
                names = parse_json(index.read_bytes())["weight_map"]
                return {name: self.folder / shard for name, shard in names.items()}
            except (OSError, JsonError, KeyError, TypeError, AttributeError) as error:
                msg = f"{index} is not an index of shards: {error}"
                raise CheckpointError(msg) from error
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        msg = f"{self.folder} has neither {SINGLE} nor {INDEX}; expected safetensors weights"
        raise CheckpointError(msg)

    def _open(self, shard: Path) -> Any:
        if shard not in self._files:
            try:
                self._files[shard] = safe_open(shard, framework="pt")
            except (SafetensorError, OSError) as error:
                msg = f"{shard} cannot be opened: {error}"
                raise CheckpointError(msg) from error
        return self._files[shard]
