"""`exflow merge`: the traces of a job array become one."""

import sys

import pytest

import placement.cli
from placement.trace import RoutingTrace
from planted import planted_trace


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["placement", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        placement.cli.main()
    return caught.value.code


@pytest.fixture
def shards(tmp_path):
    paths = [tmp_path / f"trace-{shard}.safetensors" for shard in range(3)]
    for seed, path in enumerate(paths):
        planted_trace(tokens=50, seed=seed, sequences=4).save(path)
    return paths


def test_the_traces_of_shards_become_one(shards, tmp_path, monkeypatch, capsys):
    output = tmp_path / "trace.safetensors"
    assert call(monkeypatch, "merge", *shards, "-o", output) == 0
    merged, parts = RoutingTrace.load(output), [RoutingTrace.load(path) for path in shards]
    assert merged.num_tokens == 150
    num_sequences = sum(len(set(part.sequence_ids.tolist())) for part in parts)
    assert len(set(merged.sequence_ids.tolist())) == num_sequences
    assert (merged.expert_ids[50:100] == parts[1].expert_ids).all()
    assert f"150 tokens of {num_sequences} sequences from 3 traces" in capsys.readouterr().out


def test_a_trace_that_is_there_is_kept_unless_told(shards, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "merge", *shards, "-o", shards[0]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert RoutingTrace.load(shards[0]).num_tokens == 50


def test_traces_of_different_models_are_refused(shards, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.safetensors"
    planted_trace(experts=4).save(other)
    assert call(monkeypatch, "merge", shards[0], other, "-o", tmp_path / "out") == 2
    assert "different models" in capsys.readouterr().err
