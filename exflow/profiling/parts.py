"""Parts: what a profiling run has finished, kept next to its output until the trace is whole.

    trace.safetensors.parts/
        manifest.json             the arguments and the files that were read
        batch-000017.safetensors  the trace of one finished batch
        batch-000018.empty        a batch that recorded no token (every text ended at once)

Files appear under their names only when complete. A run with the same arguments takes up where the
last one stopped; a run with others is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.errors import UserError
from placement.merging import merge_traces
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class PartsError(UserError):
    """Parts that belong to another run, or that are incomplete."""


class PartsFolder:
    """The parts of one output file."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".parts")

    def open(self, manifest: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Starts a run or takes one up again; with `overwrite`, in place of any other run.

        Raises:
            PartsError: if the folder holds the parts of a run with other arguments.
        """
        path = self.folder / "manifest.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if not overwrite or found == manifest:
                self._check(found, manifest)
                return
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"manifest.{os.getpid()}.partial"
        partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def _check(self, found: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        names = [name for name in manifest if found.get(name) != manifest[name]]
        if names:
            name = names[0]
            msg = (
                f"{self.folder} holds an unfinished run with other arguments: {name} was "
                f"{found.get(name)!r}, now {manifest[name]!r}; give the same arguments to finish "
                f"it, --overwrite to start again, or another output file"
            )
            raise PartsError(msg)

    def is_empty(self) -> bool:
        """Whether no batch is finished."""
        return not any(self.folder.glob("batch-*"))

    def has(self, batch: int) -> bool:
        """Whether a batch is finished."""
        return self._path(batch).is_file() or self._empty_path(batch).is_file()

    def save(self, batch: int, trace: RoutingTrace | None) -> None:
        """Keeps a finished batch; None for one without a token."""
        if trace is None:
            self._empty_path(batch).touch()
        else:
            trace.save(self._path(batch))

    def merge(self, num_batches: int) -> RoutingTrace:
        """The whole trace, sorted by document and position.

        Raises:
            PartsError: if a batch is missing or no token was recorded.
        """
        missing = [batch for batch in range(num_batches) if not self.has(batch)]
        if missing:
            msg = (
                f"{self.folder} lacks {len(missing)} of {num_batches} batches: the output folder "
                f"must be one that all nodes share"
            )
            raise PartsError(msg)
        paths = [self._path(batch) for batch in range(num_batches)]
        traces = [RoutingTrace.load(path) for path in paths if path.is_file()]
        if not traces:
            msg = "no token was recorded: every text was empty or ended at its prompt"
            raise PartsError(msg)
        return join(traces)

    def remove(self) -> None:
        """Deletes the folder, once the trace is saved."""
        shutil.rmtree(self.folder)

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:06d}.safetensors"

    def _empty_path(self, batch: int) -> Path:
        return self._path(batch).with_suffix(".empty")


def join(parts: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace of parts that share their numbering of sequences, sorted by document and position.

    `merge_traces` numbers sequences anew, part by part; here the parts' own numbers are unique.
    """
    whole = merge_traces(parts)
    sequence_ids = np.concatenate([part.sequence_ids for part in parts])
    domains = tuple(sorted(whole.domains))
    renumber = np.array([domains.index(name) for name in whole.domains], dtype=np.uint8)
    assert whole.positions is not None
    assert whole.domain_ids is not None
    return replace(
        whole, sequence_ids=sequence_ids, domains=domains, domain_ids=renumber[whole.domain_ids]
    ).select(np.lexsort((whole.positions, sequence_ids)))
