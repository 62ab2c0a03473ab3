"""Choosing tokens."""

import numpy as np
import pytest
import torch

from exflow.runtime.requests import SamplingError, SamplingParams
from exflow.runtime.sampling import sample, uniform


def draw(logits, params, *, count=1, first_position=0, request=0):
    return sample(
        logits.expand(count, -1),
        [params] * count,
        request_indices=np.full(count, request, dtype=np.int64),
        positions=np.arange(first_position, first_position + count, dtype=np.int64),
    )


LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_give_no_token(params, value):
    logits = LOGITS.clone()
    logits[0, 2] = value
    assert draw(logits, params).tolist() == [-1]
    assert draw(torch.full((1, 4), float("-inf")), SamplingParams()).tolist() == [-1]


def test_temperature_zero_takes_the_likeliest():
    assert draw(LOGITS, SamplingParams()).tolist() == [1]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=0.3),
        SamplingParams(temperature=0.01),
    ],
)
def test_cutting_all_but_the_likeliest_is_greedy(params):
    assert set(draw(LOGITS, params, count=200).tolist()) == {1}


def test_random_tokens_come_with_their_probabilities():
    tokens = draw(LOGITS, SamplingParams(temperature=1.0), count=20000)
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    assert shares.tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.015)


def test_temperature_sharpens():
    tokens = draw(LOGITS, SamplingParams(temperature=0.5), count=20000)
    squares = torch.tensor([0.01, 0.16, 0.04, 0.09])
    expected = (squares / squares.sum()).tolist()
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    assert shares.tolist() == pytest.approx(expected, abs=0.015)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    tokens = draw(LOGITS, SamplingParams(temperature=1.0, top_p=0.6), count=2000)
    assert set(tokens.tolist()) == {1, 3}


def test_top_k_cuts_before_top_p():
    # Of the three likeliest, 4:3:2, the first two make 7/9.
    tokens = draw(LOGITS, SamplingParams(temperature=1.0, top_k=3, top_p=0.75), count=2000)
    assert set(tokens.tolist()) == {1, 3}


def test_a_choice_does_not_depend_on_the_rest_of_the_batch():
    params = SamplingParams(temperature=1.0, seed=3)
    together = draw(LOGITS, params, count=50)
    alone = [draw(LOGITS, params, first_position=p).item() for p in range(50)]
    assert together.tolist() == alone


def test_seeds_requests_and_positions_differ():
    indices = np.zeros(1000, dtype=np.int64)
    positions = np.arange(1000)
    streams = [
        uniform(np.full(1000, seed % 2**64, dtype=np.uint64), indices + shift, positions)
        for seed, shift in [(0, 0), (1, 0), (-1, 0), (0, 1)]
    ]
    for number, stream in enumerate(streams):
        assert 0 <= stream.min() < stream.max() < 1
        assert stream.mean() == pytest.approx(0.5, abs=0.05)
        for other in streams[:number]:
            assert abs(np.corrcoef(stream, other)[0, 1]) < 0.15


def test_no_rows_give_no_tokens():
    empty = torch.empty(0, 4)
    nothing = np.empty(0, dtype=np.int64)
    assert sample(empty, [], request_indices=nothing, positions=nothing).shape == (0,)


def test_rows_with_different_parameters_get_what_each_gets_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=3),
        SamplingParams(temperature=0.7, top_p=0.5, seed=9),
        SamplingParams(temperature=2.0, top_k=20, top_p=0.9),
        SamplingParams(temperature=1.0, seed=1),
    ]
    requests, positions = np.arange(6), np.full(6, 17)
    together = sample(logits, params, request_indices=requests, positions=positions)
    alone = [
        sample(
            logits[row : row + 1],
            params[row : row + 1],
            request_indices=requests[row : row + 1],
            positions=positions[row : row + 1],
        ).item()
        for row in range(6)
    ]
    assert together.tolist() == alone
    assert together[0] == logits[0].argmax()


def test_parameters_alike_are_the_same_whatever_holds_them():
    params = SamplingParams(seed=np.int32(3), max_tokens=np.int64(5), stop={"b", "aa"})
    assert repr(params) == repr(SamplingParams(seed=3, max_tokens=5, stop=("aa", "b")))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"seed": None},
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"max_tokens": "5"},
        {"stop": [""]},
        {"stop": 5},
        {"stop_token_ids": ["a"]},
    ],
)
def test_parameters_out_of_range_are_named(wrong):
    with pytest.raises(SamplingError, match=next(iter(wrong))):
        SamplingParams(**wrong)
