"""Which clusters this machine has: a file each, so that `down` and later runs know them.

A cluster that `run` made has an owner, as has one that `up` is still making; if that process is gone
(killed, say, so that it could not clean up), the next command of ours takes the cluster down.
Processes that a `run` starts carry its mark, so that those it left in a cluster that stays are ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster_in_a_box.cluster import Cluster
from launch.cluster_in_a_box.errors import BoxError

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path("/run/exflow-cluster-in-a-box")
MARK = "BOX_RUNNER"
RUNNER = re.compile(MARK.encode() + rb"=([0-9]{1,18}) ([0-9]{1,18})")


def claim(cluster: Cluster) -> None:
    """Note that the cluster exists from now on, and is this process's.

    Raises:
        BoxError: if there is one of this name.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    owner = [os.getpid(), _birth(os.getpid())]
    try:
        with _path(cluster.name).open("x", encoding="utf-8") as file:
            json.dump({"cluster": asdict(cluster), "owner": owner}, file)
    except FileExistsError as error:
        msg = f"a cluster {cluster.name!r} is up already; take it down, or choose another --name"
        raise BoxError(msg) from error


def keep(cluster: Cluster) -> None:
    """The cluster is whole, and stays when this process ends."""
    partial = _path(cluster.name).with_suffix(".partial")
    partial.write_text(json.dumps({"cluster": asdict(cluster), "owner": None}), encoding="utf-8")
    partial.replace(_path(cluster.name))


def release(cluster: Cluster) -> None:
    """The cluster is no more."""
    _path(cluster.name).unlink(missing_ok=True)


def find(name: str) -> Cluster | None:
    """The cluster of this name that is up and stays."""
    return next((cluster for cluster in standing() if cluster.name == name), None)


def standing() -> list[Cluster]:
    """Clusters that stay."""
    return [cluster for cluster, owner in _all() if owner is None]


def abandoned() -> list[Cluster]:
    """Clusters whose owner has died."""
    return [cluster for cluster, owner in _all() if owner is not None and _has_died(*owner)]


def mark() -> dict[str, str]:
    """An environment variable that tells whose a process is."""
    return {MARK: f"{os.getpid()} {_birth(os.getpid())}"}


def is_abandoned(pid: int) -> bool:
    """Whether a process was started by a `run` that has died."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    marks = [match for variable in variables if (match := RUNNER.fullmatch(variable))]
    return any(_has_died(int(mark[1]), int(mark[2])) for mark in marks)


def _all() -> Iterator[tuple[Cluster, list[int] | None]]:
    for path in sorted(FOLDER.glob("*.json")):
        with contextlib.suppress(FileNotFoundError):
            yield _load(path)


def _has_died(pid: int, birth: int) -> bool:
    return _birth(pid) != birth


def _load(path: Path) -> tuple[Cluster, list[int] | None]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Cluster(**data["cluster"]), data["owner"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path} cannot be read ({error}); remove it, and its namespaces with `ip netns del`"
        raise BoxError(msg) from error


def _path(name: str) -> Path:
    return FOLDER / f"{name}.json"


def _birth(pid: int) -> int:
    """When a process started, in clock ticks; -1 if there is none. Tells apart reused ids."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
