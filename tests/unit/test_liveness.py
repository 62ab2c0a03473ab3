"""Liveness: whom a rank blames when it loses contact."""

import time

import pytest

from exflow.runtime.errors import ContactLostError, RankFailureError
from exflow.runtime.liveness import Liveness

TIMEOUT = 0.5


class FakeStore:
    """A store in this process, which may be lost and in which others may fall silent."""

    def __init__(self, others):
        self.beats = dict.fromkeys(map(str, others), 0)
        self.is_lost = False

    def set(self, _key, _value):
        if self.is_lost:
            msg = "Broken pipe"
            raise RuntimeError(msg)

    def check(self, keys):
        return keys[0] in self.beats

    def get(self, key):
        self.beats[key] += 1
        return str(self.beats[key]).encode()

    def silence(self, rank):
        self.beats.pop(str(rank))


def what_is_said(store, strike, **options):
    liveness = Liveness(store, rank=1, num_ranks=4, timeout=TIMEOUT, **options)
    with liveness.beating():
        time.sleep(TIMEOUT)
        strike()
        with pytest.raises(RankFailureError) as caught, liveness.naming():
            raise ContactLostError
    assert liveness.is_broken
    return str(caught.value)


@pytest.mark.parametrize("silent", [0, 2, 3])
def test_the_silent_rank_is_named(silent):
    store = FakeStore([0, 2, 3])
    assert f"rank {silent} was killed" in what_is_said(store, lambda: store.silence(silent))


@pytest.mark.parametrize("holder", ["rank 0", "the launcher of the first node"])
def test_a_lost_store_tells_of_its_holder(holder):
    store = FakeStore([0, 2, 3])

    def lose():
        store.is_lost = True

    assert f"{holder} was killed" in what_is_said(store, lose, store_holder=holder)


def test_without_silence_it_is_the_step_that_was_missed():
    assert "did not come to the same step" in what_is_said(FakeStore([0, 2, 3]), lambda: None)
