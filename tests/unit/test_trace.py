"""Routing traces: known answers, files, splitting, merging."""

import dataclasses

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from placement.merging import merge_traces
from placement.output import OutputError
from placement.trace import RoutingTrace, TraceError


def make_trace(expert_ids, **fields):
    expert_ids = np.asarray(expert_ids, dtype=np.int16)
    defaults = {
        "sequence_ids": np.arange(len(expert_ids), dtype=np.int32),
        "num_experts": 4,
        "model": "toy",
        "layer_ids": tuple(range(expert_ids.shape[1])),
    }
    return RoutingTrace(expert_ids=expert_ids, **(defaults | fields))


def full_trace(tokens=6, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(4)[:2] for _ in range(tokens * 3)]).reshape(tokens, 3, 2)
    return make_trace(
        ids,
        sequence_ids=np.repeat(np.arange(tokens // 2, dtype=np.int32), 2),
        positions=np.arange(tokens, dtype=np.int32),
        expert_weights=rng.random((tokens, 3, 2)).astype(np.float16),
        domain_ids=(np.arange(tokens) % 2).astype(np.uint8),
        domains=("code", "prose"),
        foretold_ids=ids.reshape(-1, 2)[:tokens].astype(np.int16),
        phase="decode",
        source="a test",
        licence="none",
        layer_ids=(1, 2, 4),
    )


def test_a_trace_survives_saving_and_loading(tmp_path):
    trace = full_trace()
    trace.save(tmp_path / "trace.safetensors")
    loaded = RoutingTrace.load(tmp_path / "trace.safetensors")
    for field in dataclasses.fields(RoutingTrace):
        expected, found = getattr(trace, field.name), getattr(loaded, field.name)
        assert np.array_equal(expected, found), f"{field.name} changed on the way through a file"


def test_a_split_keeps_sequences_whole_and_loses_no_token():
    trace = full_trace(tokens=40)
    fit, held_out = trace.split(seed=3)
    assert not set(fit.sequence_ids) & set(held_out.sequence_ids)
    assert fit.num_tokens + held_out.num_tokens == trace.num_tokens
    assert fit.num_sequences == 10


def test_the_split_is_the_documented_one():
    trace = make_trace(np.zeros((10, 1, 1)))
    order = np.arange(10)
    np.random.default_rng(0).shuffle(order)
    fit, _ = trace.split()
    assert set(fit.sequence_ids) == set(order[:5])


def test_one_sequence_cannot_be_split():
    with pytest.raises(TraceError, match="at least two sequences"):
        make_trace([[[0]], [[1]]], sequence_ids=np.zeros(2, dtype=np.int32)).split()


def test_the_null_keeps_load_and_breaks_token_paths():
    trace = make_trace(np.repeat(np.arange(4), 50).reshape(-1, 1, 1).repeat(2, axis=1))
    null = trace.shuffled_layers(seed=0)
    assert np.array_equal(
        np.bincount(null.expert_ids[:, 1, 0]), np.bincount(trace.expert_ids[:, 1, 0])
    )
    same = (null.expert_ids[:, 0, 0] == null.expert_ids[:, 1, 0]).mean()
    assert same < 0.4, "tokens that always repeat their expert should do so a quarter of the time"


def test_merging_keeps_sequences_apart_and_matches_domains_by_name():
    one = full_trace()
    other = dataclasses.replace(one, domains=("prose", "law"))
    merged = merge_traces([one, other])
    assert merged.num_sequences == 2 * one.num_sequences
    assert merged.domains == ("code", "prose", "law")
    assert merged.domain("prose").num_tokens == one.num_tokens
    assert merged.domain("law").num_tokens == one.num_tokens // 2


def test_merging_drops_an_array_that_one_trace_lacks():
    one = full_trace()
    merged = merge_traces([one, dataclasses.replace(one, positions=None)])
    assert merged.positions is None
    assert merged.expert_weights is not None


def test_traces_of_different_models_do_not_merge():
    with pytest.raises(TraceError, match="num_experts is 4 in one, 5 in another"):
        merge_traces([full_trace(), dataclasses.replace(full_trace(), num_experts=5)])


def test_merging_goes_by_the_last_part_of_a_models_name():
    copy, nameless = (dataclasses.replace(full_trace(), model=m) for m in ("hub/toy", "unknown"))
    assert merge_traces([nameless, copy, full_trace()]).model == "hub/toy"
    with pytest.raises(TraceError, match="model is hub/toy in one, toy-2 in another"):
        merge_traces([nameless, copy, dataclasses.replace(full_trace(), model="toy-2")])


def test_merging_refuses_more_sequences_than_their_ids_can_tell():
    huge = dataclasses.replace(full_trace(), sequence_ids=np.full(6, 2**31 - 1))
    assert merge_traces([huge]).sequence_ids.dtype == np.int32
    with pytest.raises(TraceError, match=r"sequence_ids reach 2147483650.* each trace from 0"):
        merge_traces([huge, full_trace()])


def test_merging_refuses_more_domains_than_their_ids_can_tell():
    many = dataclasses.replace(full_trace(), domains=tuple(map(str, range(255))))
    with pytest.raises(TraceError, match="name 257 domains, expected at most 256"):
        merge_traces([many, full_trace()])


def test_loads_alone_stay_loads_alone_when_they_are_merged():
    counts = dataclasses.replace(full_trace(), phase="counts")
    assert merge_traces([full_trace(), counts]).phase == "counts"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_ids": "[" * 100_000}, "too deeply nested"),
        ({"layer_ids": '["x", 1, 2]'}, "layer_ids must list whole numbers"),
        ({"num_experts": "9" * 5000}, "not a usable routing trace"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, changes, message):
    path = tmp_path / "trace.safetensors"
    full_trace().save(path)
    with safe_open(path, framework="np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata | changes)
    with pytest.raises(TraceError, match=rf"trace\.safetensors: .*{message}"):
        RoutingTrace.load(path)


def test_a_trace_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="it is a folder; name a file"):
        full_trace().save(tmp_path / "folder")
    (tmp_path / "t.partial").mkdir()
    with pytest.raises(OutputError, match="t: cannot be written"):
        full_trace().save(tmp_path / "t")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "t.partial"]


def test_top1_keeps_the_first_expert():
    trace = full_trace()
    assert np.array_equal(trace.top1().expert_ids[:, :, 0], trace.expert_ids[:, :, 0])
    assert trace.top1().top_k == 1


@pytest.mark.parametrize(
    ("expert_ids", "fields", "message"),
    [
        (np.zeros((0, 2, 1)), {}, "no tokens"),
        (np.zeros((2, 2)), {"layer_ids": (0, 1)}, r"\(tokens, layers, top_k\)"),
        (np.full((2, 1, 1), 4), {}, "expert ids run from 4 to 4, expected 0 to 3"),
        (np.full((2, 1, 1), -1), {}, "expert ids run from -1"),
        (np.zeros((2, 1, 1)), {"foretold_ids": np.full((2, 1), 9, np.int16)}, "foretold ids run"),
        (np.full((2, 1, 2), 3), {}, r"names an expert twice at layer 0 \(expert ids\)"),
        (
            np.array([[[0, 1]], [[2, 3]]]),
            {"foretold_ids": np.full((2, 2), 3, np.int16)},
            r"twice at layer 0 \(foretold ids\)",
        ),
        (np.zeros((2, 1, 1)), {"layer_ids": (0, 1)}, "names 2 layers"),
        (np.zeros((2, 1, 1)), {"sequence_ids": np.zeros(3, np.int32)}, "sequence_ids must have"),
        (np.zeros((2, 1, 1)), {"domain_ids": np.ones(2, np.uint8)}, "domain_ids reach 1"),
        (
            np.zeros((2, 1, 1)),
            {"expert_weights": np.full((2, 1, 1), np.nan, np.float16)},
            "NaN",
        ),
        (np.zeros((2, 1, 1)), {"expert_weights": np.ones((2, 1, 1), int)}, "must be float16"),
        (np.zeros((2, 1, 1)), {"num_experts": 40000}, "num_experts is 40000, expected at most"),
        (np.zeros((2, 1, 1)), {"sequence_ids": np.zeros(2)}, "sequence_ids must be int32, got fl"),
        (np.zeros((2, 1, 1)), {"sequence_ids": np.array([0, -1])}, "sequence_ids run from -1 to 0"),
        (np.zeros((2, 1, 1)), {"sequence_ids": np.array([0, 1 << 31])}, "to 2147483648, expected"),
        (np.zeros((2, 1, 1)), {"positions": np.full(2, np.nan)}, "positions must be int32"),
        (np.zeros((2, 1, 1)), {"positions": np.array([0, -2])}, "positions run from -2 to 0"),
        (
            np.zeros((2, 1, 1)),
            {"domain_ids": np.array([0, -1], np.int8), "domains": ("a",)},
            "domain_ids run from -1",
        ),
    ],
)
def test_a_malformed_trace_says_what_is_wrong(expert_ids, fields, message):
    with pytest.raises(TraceError, match=message):
        make_trace(expert_ids, **fields)


def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(TraceError, match=r"model\.safetensors.*expected 'exflow\.trace/1'"):
        RoutingTrace.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(TraceError, match="not a usable routing trace"):
        RoutingTrace.load(path)
    with pytest.raises(TraceError, match="no such trace"):
        RoutingTrace.load(tmp_path / "nothing.safetensors")
