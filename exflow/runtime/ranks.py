"""Who we are among the ranks of a job. Nothing else asks `torch.distributed` or torchrun's variables."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from exflow.runtime.collectives import all_to_all, lost
from exflow.runtime.errors import RankFailureError
from exflow.runtime.liveness import Liveness
from placement.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


logger = logging.getLogger(__name__)
DEFAULT_TIMEOUT = 600.0


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the job.

    Attributes:
        rank: its number, from 0.
        num_ranks: how many there are.
        local_rank: its number on its node.
        ranks_per_node: how many ranks each node has.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    ranks_per_node: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun says, or DeepSpeed's launcher; one rank without either.

        Raises:
            UserError: the variables are not whole numbers.
        """
        local_size = os.environ.get("LOCAL_SIZE", "1")  # what DeepSpeed calls it
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        defaults["LOCAL_WORLD_SIZE"] = local_size
        try:
            rank, num_ranks, local_rank, ranks_per_node = (
                int(os.environ.get(name, default)) for name, default in defaults.items()
            )
        except ValueError as error:
            msg = f"{', '.join(defaults)} must be whole numbers: {error}; start it with torchrun"
            raise UserError(msg) from error
        return cls(
            rank=rank,
            num_ranks=num_ranks,
            local_rank=local_rank,
            ranks_per_node=ranks_per_node if num_ranks % ranks_per_node == 0 else num_ranks,
        )

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reads results and writes files."""
        return self.rank == 0

    @contextlib.contextmanager
    def connected(
        self, device: torch.device, *, timeout: float = DEFAULT_TIMEOUT
    ) -> Iterator[Liveness]:
        """A process group for the duration: NCCL on GPUs, gloo on CPUs, none for one rank.

        Gloo, too, where ranks share a GPU, which NCCL refuses (before 2.30): to try things out.

        A group that exists already is used and left alone.

        Args:
            device: where this rank computes.
            timeout: seconds that a rank waits for another in a collective.

        Raises:
            RankFailureError: not all ranks came.
        """
        if self.num_ranks == 1 or dist.is_initialized():
            yield Liveness(None, rank=self.rank, num_ranks=self.num_ranks, timeout=timeout)
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = self._meet(device, timedelta(seconds=timeout))
        liveness = Liveness(
            store,
            rank=self.rank,
            num_ranks=self.num_ranks,
            timeout=timeout,
            store_holder=_store_holder(),
        )
        try:
            with liveness.beating():
                yield liveness
        finally:
            if not liveness.is_broken:
                dist.destroy_process_group()

    def _meet(self, device: torch.device, timeout: timedelta) -> Store:
        """The process group comes to be; a store of its own for beats.

        On CPUs this process becomes a batch process first: gloo's threads, which begin here, then
        wait until a core is free instead of interrupting what computes. Measured on two cores, an
        all-to-all takes 0.6 of the time with two ranks and 0.4 with four.
        """
        if device.type == "cpu" and hasattr(os, "SCHED_BATCH"):
            with contextlib.suppress(PermissionError):  # some containers forbid it
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        store: Any = None
        try:
            store, _, _ = next(rendezvous("env://", timeout=timeout))
            beats = PrefixStore("exflow", store.clone())
            dist.init_process_group(
                self._backend(PrefixStore("gpus", store), device),
                store=PrefixStore("group", store),
                rank=self.rank,
                world_size=self.num_ranks,
                timeout=timeout,
            )
        except RuntimeError as error:
            msg = (
                f"{self._missing(store)} within {timeout.total_seconds():g} s (--timeout): {error}"
            )
            raise RankFailureError(msg.splitlines()[0]) from error
        return beats

    def _missing(self, store: Store | None) -> str:
        """That ranks did not come and, as far as the store tells, which."""
        missing: list[int] = []
        if store is not None:
            with contextlib.suppress(RuntimeError):
                places = PrefixStore("gpus", store)
                missing = [n for n in range(self.num_ranks) if not places.check([str(n)])]
        if missing:
            return f"ranks {missing}, which may say why themselves, did not come"
        return f"not all {self.num_ranks} ranks came"

    def _backend(self, store: Store, device: torch.device) -> str:
        """NCCL if every rank has a GPU of its own; all ranks ask, and come to the same.

        Raises:
            UserError: some ranks compute on GPUs and some do not.
        """
        is_gpu = device.type == "cuda"
        mine = str(torch.cuda.get_device_properties(device).uuid) if is_gpu else device.type
        store.set(str(self.rank), mine)
        places = [store.get(str(rank)).decode() for rank in range(self.num_ranks)]
        without = [rank for rank, place in enumerate(places) if place == "cpu"]
        if len(without) == self.num_ranks:
            return "gloo"
        if without:
            msg = f"ranks {without} have no GPU and the others do; use --device cpu on all"
            raise UserError(msg)
        if len(set(places)) == self.num_ranks:
            return "nccl"
        if self.is_first:
            logger.warning("ranks share a GPU, which NCCL refuses: their messages go by gloo")
        return "gloo"

    def uses_nccl(self) -> bool:
        """Whether messages go by NCCL: then they can be part of a CUDA graph."""
        return bool(dist.is_initialized() and dist.get_backend() == "nccl")

    def node_group(self, num_nodes: int) -> dist.ProcessGroup:
        """The ranks of this rank's node, of `num_nodes` alike; every rank must ask."""
        size = self.num_ranks // num_nodes
        firsts = range(0, self.num_ranks, size)
        groups = [_new_group(list(range(first, first + size))) for first in firsts]
        return groups[self.rank // size]

    def second_group(self) -> dist.ProcessGroup:
        """All ranks once more, for what goes on beside other collectives; every rank must ask."""
        return _new_group(list(range(self.num_ranks)))

    def gather(self, value: Any, device: torch.device) -> list[Any]:
        """The value of every rank, by rank, on every rank. Values are what JSON can hold."""
        if self.num_ranks == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        parts = self.gather_arrays(content, device)
        return [json.loads(bytes(part.numpy())) for part in parts]

    def gather_arrays(self, array: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
        """The one-dimensional tensors of all ranks, of any lengths but one type, on every rank."""
        if self.num_ranks == 1:
            return [array]
        length = torch.tensor([len(array)] * self.num_ranks, device=device)
        lengths = torch.empty_like(length)
        all_to_all(lengths, length, place=self.rank)
        sizes = lengths.tolist()
        sent = array.to(device).repeat(self.num_ranks)
        received = torch.empty(sum(sizes), dtype=array.dtype, device=device)
        all_to_all(received, sent, sizes, [len(array)] * self.num_ranks, place=self.rank)
        return list(torch.split(received.cpu(), sizes))

    @contextlib.contextmanager
    def agreeing(self, device: torch.device) -> Iterator[None]:
        """Runs a block on every rank; if an error stops one, an error stops all.

        Raises:
            Exception: the rank's own error.
            RankFailureError: the first error of another rank.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:  # it is raised when the others know
            problem = error
        told = None if problem is None else str(problem) or type(problem).__name__
        problems = self.gather(told, device)
        if problem is not None:
            raise problem
        for rank, message in enumerate(problems):
            if message is not None:
                msg = f"rank {rank} cannot go on: {message}"
                raise RankFailureError(msg)


def _new_group(members: list[int]) -> dist.ProcessGroup:
    try:
        group: dist.ProcessGroup = dist.new_group(members)
    except RuntimeError as error:
        raise lost(error) from error
    return group


def _store_holder() -> str:
    """In whose process the job's store is: torchrun's agent holds it unless rank 0 must."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "the launcher of the first node"
    return "rank 0"
