"""Requests join and leave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exflow.runtime.kv_cache import PAGE_SIZE
from exflow.runtime.limits import Limits
from exflow.runtime.requests import Request, SamplingParams
from exflow.runtime.scheduler import Scheduler


def make_requests(lengths, **params):
    params = SamplingParams(**({"max_tokens": 4} | params))
    return [
        Request(index=i, id=i, prompt="", token_ids=(1,) * length, params=params)
        for i, length in enumerate(lengths)
    ]


def make_limits(**changes):
    defaults = {
        "max_positions": 100,
        "eos_token_ids": (9,),
        "batch_size": 2,
        "num_pages": 50,
    }
    return Limits(**(defaults | changes))


def run(scheduler, token=1):
    """Give every request in flight the same token until all are done."""
    completions, most_pages, most_slots = [], 0, 0
    for _ in range(10_000):
        if not scheduler.has_work:
            return completions, most_pages, most_slots
        _, refused = scheduler.join()
        completions += refused
        most_slots = max(most_slots, len({flight.slot for flight in scheduler.running}))
        assert most_slots == 0 or len({f.slot for f in scheduler.running}) == len(scheduler.running)
        most_pages = max(most_pages, sum(len(flight.pages) for flight in scheduler.running))
        completions += scheduler.advance(dict.fromkeys([f.slot for f in scheduler.running], token))
    pytest.fail("the scheduler does not end")


def test_requests_wait_for_a_slot_and_join_when_one_leaves():
    scheduler = Scheduler(make_requests([3, 3, 3]), make_limits(), domain_of_rank=[0, 0])
    joined, _ = scheduler.join()
    assert [flight.request.index for flight in joined] == [0, 1]
    assert [flight.home for flight in joined] == [0, 1]
    assert scheduler.join() == ([], [])
    finished = scheduler.advance({joined[0].slot: 9, joined[1].slot: 1})
    assert [(c.request.index, c.finish_reason, c.token_ids) for c in finished] == [
        (0, "stop", (9,))
    ]
    joined, _ = scheduler.join()
    assert [flight.request.index for flight in joined] == [2]


def test_a_request_ends_at_its_length():
    completions, _, _ = run(Scheduler(make_requests([3]), make_limits(), domain_of_rank=[0]))
    assert [(c.finish_reason, c.token_ids) for c in completions] == [("length", (1, 1, 1, 1))]


def test_a_request_ends_where_the_model_s_positions_do():
    limits = make_limits(max_positions=10)
    completions, _, _ = run(Scheduler(make_requests([10, 9, 2]), limits, domain_of_rank=[0]))
    lengths = {c.request.index: len(c.token_ids) for c in completions}
    assert lengths == {0: 1, 1: 2, 2: 4}


@pytest.mark.parametrize(
    ("length", "limits", "reason"),
    [
        (0, {}, "no tokens"),
        (101, {}, "101 tokens, the model takes 100"),
        (40, {"max_pages": 2}, "needs 3 pages of 16 tokens of KV cache for 40 prompt"),
    ],
)
def test_a_request_that_can_never_run_is_refused_and_the_others_go_on(length, limits, reason):
    scheduler = Scheduler(make_requests([3, length, 3]), make_limits(**limits), domain_of_rank=[0])
    completions, _, _ = run(scheduler)
    refused = [c for c in completions if c.finish_reason == "refused"]
    assert [c.request.index for c in refused] == [1]
    assert reason in refused[0].reason
    assert sorted(c.request.index for c in completions) == [0, 1, 2]


@given(
    lengths=st.lists(st.integers(1, 60), max_size=12),
    batch_size=st.integers(1, 5),
    num_pages=st.integers(4, 8),
    domain_of_rank=st.sampled_from([[0], [0, 0], [0, 1], [0, 0, 1, 1]]),
)
def test_all_requests_finish_within_slots_and_pages(lengths, batch_size, num_pages, domain_of_rank):
    limits = make_limits(batch_size=batch_size, num_pages=num_pages)
    scheduler = Scheduler(make_requests(lengths), limits, domain_of_rank=domain_of_rank)
    completions, most_pages, most_slots = run(scheduler)
    assert sorted(c.request.index for c in completions) == list(range(len(lengths)))
    assert most_slots <= batch_size
    assert most_pages <= num_pages * len(set(domain_of_rank))


def test_limits_for_requests_have_pages_for_the_longest_batch():
    class Definition:
        max_positions = 1000
        eos_token_ids = ()

    requests = make_requests([PAGE_SIZE, 3 * PAGE_SIZE, 5 * PAGE_SIZE, 2000], max_tokens=PAGE_SIZE)
    limits = Limits.for_requests(requests, Definition(), batch_size=2)
    assert (limits.num_pages, limits.batch_size) == (6 + 4, 2)
    assert Limits.for_requests(requests, Definition(), batch_size=10**11).batch_size == 4


def test_a_full_domain_does_not_hold_up_the_others():
    """Requests of rank 0 need all its pages; those of rank 1 join past them, in order."""
    scheduler = Scheduler(
        make_requests([60, 1, 60, 1, 1]),
        make_limits(num_pages=4, batch_size=4),
        domain_of_rank=[0, 1],
    )
    joined, _ = scheduler.join()
    assert [flight.request.index for flight in joined] == [0, 1, 3]
    scheduler.advance({joined[0].slot: 9})
    assert [flight.request.index for flight in scheduler.join()[0]] == [2]


def test_long_prompts_are_read_in_parts_and_those_before_go_first():
    scheduler = Scheduler(
        make_requests([5, 3, 4, 2]),
        make_limits(batch_size=4, prefill_chunk=4),
        domain_of_rank=[0, 0],
    )
    scheduler.join()
    passes = []
    while len(scheduler.decoding) < 4:
        chunks = scheduler.next_chunks()
        passes.append([(c.flight.request.index, c.start, c.stop, c.is_last) for c in chunks])
    assert passes == [
        [(0, 0, 4, False), (1, 0, 3, True), (3, 0, 1, False)],
        [(0, 4, 5, True), (2, 0, 3, False), (3, 1, 2, True)],
        [(2, 3, 4, True)],
    ]
    assert scheduler.next_chunks() == []


def test_a_stop_token_ends_a_text_and_an_end_token_may_be_ignored():
    for params, token, reason in (
        ({"stop_token_ids": [7]}, 7, "stop"),
        ({"stop_token_ids": [7], "ignore_eos": True}, 7, "stop"),
        ({"ignore_eos": True}, 9, "length"),
    ):
        scheduler = Scheduler(make_requests([3], **params), make_limits(), domain_of_rank=[0])
        completions, _, _ = run(scheduler, token)
        assert [c.finish_reason for c in completions] == [reason]
