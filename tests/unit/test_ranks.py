"""Which messages go by NCCL and which by gloo."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from exflow.runtime.ranks import Ranks
from placement.errors import UserError

GPU = torch.device("cuda", 0)


def choose(monkeypatch, gpus):
    """The backend of every rank, given the identity of its GPU."""
    threads = {}

    def properties(device):
        return SimpleNamespace(uuid=gpus[threads[threading.get_ident()]])

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    store, found = HashStore(), {}

    def ask(rank):
        threads[threading.get_ident()] = rank
        found[rank] = Ranks(rank=rank, num_ranks=len(gpus))._backend(store, GPU)

    asking = [threading.Thread(target=ask, args=(rank,)) for rank in range(len(gpus))]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    return [found[rank] for rank in range(len(gpus))]


@pytest.mark.parametrize(
    ("gpus", "backend"), [("abc", "nccl"), ("aba", "gloo"), ("aa", "gloo"), ("a", "nccl")]
)
def test_ranks_that_share_a_gpu_talk_by_gloo_and_all_agree(monkeypatch, gpus, backend):
    assert choose(monkeypatch, gpus) == [backend] * len(gpus)


def test_cpus_talk_by_gloo():
    assert Ranks()._backend(HashStore(), torch.device("cpu")) == "gloo"


def test_a_rank_without_a_gpu_among_others_is_named():
    store = HashStore()
    store.set("1", "a GPU")
    with pytest.raises(UserError, match=r"ranks \[0\] have no GPU"):
        Ranks(num_ranks=2)._backend(store, torch.device("cpu"))
