"""Which row goes where: known ways, and the same from the kernels for CPUs as from PyTorch."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exflow.runtime import hops, rows
from exflow.runtime.cpu_rows import read_messages, write_messages
from exflow.runtime.hops import find_departures, find_fans, find_sums
from exflow.runtime.rows import RowFormat
from exflow.runtime.tables import Place


@st.composite
def situations(draw):
    """A place, who runs the experts of a few rows, and their next owners."""
    per_node, num_nodes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_ranks = per_node * num_nodes
    num_rows, top_k = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    ranks = torch.randint(0, num_ranks, (num_rows, top_k), generator=generator)
    next_owners = torch.randint(0, num_ranks, (num_rows,), generator=generator)
    rank = draw(st.integers(0, num_ranks - 1))
    return Place(rank=rank, num_ranks=num_ranks, ranks_per_node=per_node), ranks, next_owners


def both_ways(module, function):
    """What a function returns by kernels, and by PyTorch."""
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for known in (True, False):
            patch.setattr(module, "is_known", lambda _, known=known: known)
            results.append(function())
    return results


def check_equal(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()
    elif ours and isinstance(ours[0], torch.Tensor | tuple):
        for one, other in zip(ours, theirs, strict=True):
            check_equal(one, other)
    else:
        assert list(ours) == list(theirs)


@given(situations(), st.booleans())
def test_kernels_find_the_same_departures(situation, owners_move):
    place, ranks, next_owners = situation
    moved = next_owners if owners_move else None
    check_equal(*both_ways(hops, lambda: find_departures(ranks, moved, place)))


@given(situations(), st.integers(0, 6), st.integers(0, 6))
def test_kernels_find_the_same_fans(situation, first, end):
    place, ranks, _ = situation
    near = slice(min(first, end, len(ranks)), min(max(first, end), len(ranks)))
    check_equal(*both_ways(hops, lambda: find_fans(ranks, near, place)))


@given(situations())
def test_kernels_find_the_same_ways_of_sums(situation):
    place, ranks, next_owners = situation
    ours, theirs = both_ways(hops, lambda: find_sums(ranks, next_owners, place))
    names = [field.name for field in dataclasses.fields(ours)]
    check_equal(*([getattr(way, name) for name in names] for way in (ours, theirs)))


def test_a_token_crosses_to_a_node_once_and_goes_on_from_a_relay():
    # Rank 1 of nodes {0, 1} and {2, 3}: a token for ranks 0, 2 and 3, another for rank 2 alone.
    place = Place(rank=1, num_ranks=4, ranks_per_node=2)
    ranks = torch.tensor([[2, 0, 3], [2, 2, 2]])
    for token_M, heads_WX in both_ways(hops, lambda: find_departures(ranks, None, place)):
        # Token 0 to rank 0, token 1 to rank 2, token 0 to rank 3, its relay on that node.
        assert token_M.tolist() == [0, 1, 0]
        assert heads_WX.tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0]]


def test_a_next_owner_gets_a_row_though_it_runs_nothing():
    place = Place(rank=0, num_ranks=2, ranks_per_node=1)
    ranks, next_owners = torch.tensor([[1], [1]]), torch.tensor([0, 1])
    for token_M, heads_WX in both_ways(hops, lambda: find_departures(ranks, next_owners, place)):
        assert token_M.tolist() == [0, 0, 1]
        assert heads_WX.tolist() == [[1, 1, 1], [2, 1, 1]]  # count; tokens that move to 0, to 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_owner", [False, True])
@pytest.mark.parametrize("num_rows", [0, 5])
def test_kernels_pack_the_same_bytes(dtype, has_owner, num_rows):
    row_format = RowFormat(hidden_size=6, top_k=3, dtype=dtype, has_owner=has_owner)
    hidden = torch.randn(num_rows, 6).to(dtype)
    choices, weights = torch.randint(0, 9999, (num_rows, 3)), torch.rand(num_rows, 3)
    owners = torch.randint(0, 9999, (2 * has_owner, num_rows))
    packed = both_ways(rows, lambda: row_format.pack(hidden, choices, weights, *owners))
    check_equal([packed[0]], [packed[1]])
    ours, theirs = both_ways(rows, lambda: row_format.metadata(packed[0]))
    check_equal([*vars(ours).values()], [*vars(theirs).values()])


@given(st.data())
def test_messages_bring_every_rank_its_rows_and_heads(data):
    num_ranks, width = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    counts = np.array(
        [[data.draw(st.integers(0, 3)) for _ in range(num_ranks)] for _ in range(num_ranks)]
    )
    sent = {}  # (source, destination): words
    tokens = {}  # source: its rows, and which of them is in each place
    for source, count_W in enumerate(counts):
        rows_TY = np.arange(4 * width, dtype=np.int32).reshape(4, width) + 100 * source
        token_M = np.array([data.draw(st.integers(0, 3)) for _ in range(count_W.sum())], np.int64)
        heads = np.stack([count_W, 7 * np.arange(num_ranks) + source], axis=1).astype(np.int32)
        words, sizes = write_messages(rows_TY, token_M, heads)
        ends = np.cumsum(sizes)
        assert ends[-1] == len(words)
        for destination, end in enumerate(ends):
            sent[source, destination] = words[end - sizes[destination] : end]
        tokens[source] = rows_TY, np.split(token_M, np.cumsum(count_W)[:-1])
    for rank in range(num_ranks):
        room = np.array([2 + 3 * width] * num_ranks)
        room[rank] = 0
        received = [np.full(size, -1, np.int32) for size in room]
        for source in set(range(num_ranks)) - {rank}:
            received[source][: len(sent[source, rank])] = sent[source, rank]
        rows_NY, heads_WX = read_messages(
            np.concatenate(received), room, sent[rank, rank], rank, 2, width
        )
        expected = [rows_TY[parts[rank]] for rows_TY, parts in tokens.values()]
        assert rows_NY.tolist() == np.concatenate(expected).tolist()
        assert heads_WX.tolist() == [
            [counts[source, rank], 7 * rank + source] for source in range(num_ranks)
        ]
