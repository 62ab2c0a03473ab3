"""Which clusters this machine has: a file each, so that `down` and later runs know them.

A cluster that `run` made has an owner; if that process is gone (killed, say, so that it could not
clean up), the next command of ours takes the cluster down.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from launch.cluster_in_a_box.cluster import Cluster
from launch.cluster_in_a_box.errors import BoxError

FOLDER = Path("/run/exflow-cluster-in-a-box")


def claim(cluster: Cluster, *, is_kept: bool) -> None:
    """Note that the cluster exists from now on.

    Raises:
        BoxError: if there is one of this name.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    owner = None if is_kept else [os.getpid(), _birth(os.getpid())]
    try:
        with _path(cluster.name).open("x", encoding="utf-8") as file:
            json.dump({"cluster": asdict(cluster), "owner": owner}, file)
    except FileExistsError as error:
        msg = f"a cluster {cluster.name!r} is up already; take it down, or choose another --name"
        raise BoxError(msg) from error


def release(cluster: Cluster) -> None:
    """The cluster is no more."""
    _path(cluster.name).unlink(missing_ok=True)


def find(name: str) -> Cluster | None:
    """The cluster of this name that is up."""
    with contextlib.suppress(FileNotFoundError):
        return _load(_path(name))[0]
    return None


def abandoned() -> list[Cluster]:
    """Clusters whose owner has died."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        with contextlib.suppress(FileNotFoundError):
            cluster, owner = _load(path)
            if owner is not None and _birth(owner[0]) != owner[1]:
                found.append(cluster)
    return found


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
