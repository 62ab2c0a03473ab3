"""The harness's own promises: results by rank, errors with their rank, no hang."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from harness import RankError, run_ranks

pytestmark = pytest.mark.distributed


class MistakeError(ValueError):
    pass


class UnpicklableError(Exception):
    def __init__(self, first, second):
        super().__init__(first)


def sum_over_ranks(offset):
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return dist.get_rank(), int(value), torch.get_num_threads(), os.environ["WORLD_SIZE"]


def is_in_a_group():
    return dist.is_initialized()


def fail_on(rank):
    if dist.get_rank() == rank:
        message = "this rank's mistake"
        raise MistakeError(message)
    dist.barrier()


def fail_unpicklably():
    first, second = "one", "two"
    raise UnpicklableError(first, second)


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def sleep_on(rank):
    if dist.get_rank() == rank:
        time.sleep(600)


def big_tensor():
    return torch.full((1 << 20,), dist.get_rank())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_process_group_and_answer_in_order(world_size):
    total = sum(rank + 10 for rank in range(world_size))
    expected = [(rank, total, 1, str(world_size)) for rank in range(world_size)]
    assert run_ranks(world_size, sum_over_ranks, 10) == expected


def test_one_rank_has_no_process_group():
    assert run_ranks(1, is_in_a_group) == [False]


def test_an_exception_keeps_its_type_and_names_its_rank():
    with pytest.raises(MistakeError, match="this rank's mistake") as caught:
        run_ranks(3, fail_on, 1)
    cause = caught.value.__cause__
    assert isinstance(cause, RankError)
    assert "rank 1: Traceback" in str(cause)
    assert "in fail_on" in str(cause)


def test_an_exception_that_cannot_be_pickled_arrives_as_text():
    with pytest.raises(RankError, match="UnpicklableError: one"):
        run_ranks(2, fail_unpicklably)


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RankError, match="rank 0: died with exit code 7"):
        run_ranks(2, die_on, 0)


@pytest.mark.slow
def test_a_hanging_rank_is_killed_and_shows_where_it_hung():
    with pytest.raises(TimeoutError, match=r"ranks \[1\] had not finished(.|\n)*in sleep_on"):
        run_ranks(2, sleep_on, 1, timeout=10)


def test_results_may_be_large():
    assert [int(tensor.sum()) for tensor in run_ranks(2, big_tensor)] == [0, 1 << 20]
