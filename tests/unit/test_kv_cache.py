"""Pages, addresses, and what they hold."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from exflow.runtime.kv_cache import PAGE_SIZE, KvCache, PagePool, pages_for


def make_cache(num_pages=6, num_slots=3, pages_per_slot=3):
    return KvCache(
        num_layers=2,
        num_pages=num_pages,
        width=4,
        num_slots=num_slots,
        pages_per_slot=pages_per_slot,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_pages_for_rounds_up():
    assert [pages_for(n) for n in (0, 1, PAGE_SIZE, PAGE_SIZE + 1)] == [0, 1, 1, 2]


@given(st.lists(st.integers(0, 3), max_size=20))
def test_a_pool_never_hands_out_a_page_twice(wishes):
    pool = PagePool(8)
    held: list[list[int]] = []
    for wish in wishes:
        if wish and wish <= pool.num_free:
            held.append(pool.take(wish))
        elif held:
            pool.give_back(held.pop(0))
        taken = [page for pages in held for page in pages]
        assert len(taken) == len(set(taken))
        assert pool.num_free == 8 - len(taken)


def test_tokens_are_found_where_they_were_written():
    cache = make_cache()
    cache.assign(0, [4, 1])
    cache.assign(2, [0, 5, 2])
    slots = torch.tensor([0] * 20 + [2] * 40)
    positions = torch.cat([torch.arange(20), torch.arange(40)])
    entries = torch.arange(60 * 4, dtype=torch.float32).view(60, 4)
    for layer in (0, 1):
        addresses = cache.addresses(slots, positions) + layer * cache.num_tokens
        cache.write(addresses, entries + 1000 * layer)
    for layer in (0, 1):
        context = cache.read(layer, cache.page_table[torch.tensor([2, 0])])
        assert torch.equal(context[0, :40], entries[20:] + 1000 * layer)
        assert torch.equal(context[1, :20], entries[:20] + 1000 * layer)


def test_addresses_of_different_tokens_differ():
    cache = make_cache()
    cache.assign(0, [4, 1])
    cache.assign(1, [3])
    slots = torch.tensor([0] * 32 + [1] * 16)
    positions = torch.cat([torch.arange(32), torch.arange(16)])
    addresses = cache.addresses(slots, positions)
    assert len(addresses.unique()) == 48
    assert int(addresses.max()) < cache.num_tokens
