"""Text of tokens as they come, stop strings, and memory budgets written as text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exflow.runtime.kv_budget import KvBudget, KvBudgetError, token_bytes
from exflow.runtime.text import TextStream


class Bytes:
    """One token a byte of UTF-8."""

    def decode(self, token_ids, *, skip_special_tokens=False):
        return bytes(token_ids).decode("utf-8", errors="replace")


def stream(text, stop=()):
    """All pieces that are handed out, and the stream."""
    tokens = TextStream(Bytes(), stop)
    pieces = []
    for byte in text.encode():
        tokens.add(byte)
        pieces.append(tokens.take(is_last=False))
        if tokens.is_stopped:
            break
    return [*pieces, tokens.take(is_last=True)], tokens


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_pieces_make_the_text(text):
    pieces, tokens = stream(text)
    assert "".join(pieces) == tokens.text == text


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=3), min_size=1))
def test_a_text_ends_before_the_stop_string_that_is_complete_first(text, stop):
    pieces, tokens = stream(text, stop)
    lengths = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    assert tokens.is_stopped == bool(lengths)
    expected = text
    if lengths:
        seen = text[: lengths[0]]
        expected = seen[: min(seen.find(s) for s in stop if s in seen)]
    assert "".join(pieces) == tokens.text == expected


def test_what_may_become_a_stop_string_is_kept_back():
    pieces, _ = stream("one END", ["END!"])
    assert pieces == ["o", "n", "e", " ", "", "", "", "END"]


class Definition:
    name = "tiny"
    num_layers = 3
    kv_width = 64


def test_memory_is_bytes_or_tokens():
    assert KvBudget.parse("2GiB") == KvBudget(num_bytes=2 << 30)
    assert KvBudget.parse("1.5 mb") == KvBudget(num_bytes=1_500_000)
    assert KvBudget.parse("4096") == KvBudget(tokens=4096)
    assert token_bytes(Definition, torch.float16) == 3 * 64 * 2
    assert KvBudget().pages(Definition, torch.float16) is None
    assert KvBudget.parse("100").pages(Definition, torch.float16) == 6
    assert KvBudget.parse("20KiB").pages(Definition, torch.float16) == 20 * 1024 // (16 * 384)


@pytest.mark.parametrize("wrong", ["", "much", "1.5", "-3", "2XB", "10B"])
def test_memory_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(KvBudgetError, match="KV memory"):
        KvBudget.parse(wrong).pages(Definition, torch.float16)
