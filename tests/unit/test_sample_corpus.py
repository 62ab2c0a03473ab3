"""The sample corpus: real text, two parts that share nothing, the same every time."""

import json

import pytest
import zstandard

from exflow.corpus import read_documents
from exflow.sample_corpus import EXERCISES, SampleCorpusError, write_sample_corpus
from placement.output import OutputError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_sample_corpus(tmp_path_factory.mktemp("corpus"))


def origins(folder):
    content = zstandard.ZstdDecompressor().stream_reader((folder / "00.jsonl.zst").open("rb"))
    return {json.loads(line)["meta"]["origin"] for line in content.read().splitlines()}


def test_both_parts_hold_every_subset(corpus):
    for split in ("profile", "heldout"):
        found = {document.subset for document in read_documents([corpus.folders[split]])}
        assert found == {"Python Docs", "Github", "Python Docstrings", "DM Mathematics"}
        assert set(corpus.documents[split]) == found
    assert corpus.num_characters > 2_000_000


def test_no_topic_module_or_exercise_is_in_both_parts(corpus):
    profile, held_out = (origins(corpus.folders[split]) for split in ("profile", "heldout"))
    assert not profile & held_out
    assert 0.15 < len(held_out) / len(profile | held_out) < 0.35


def test_the_beginning_is_mixed(corpus):
    documents = list(read_documents([corpus.folders["profile"]]))[:40]
    assert len({document.subset for document in documents}) == 4


def test_the_same_seed_writes_the_same_bytes(corpus, tmp_path):
    again = write_sample_corpus(tmp_path / "again")
    other = write_sample_corpus(tmp_path / "other", seed=1)
    first, second, third = (
        (c.folders["profile"] / "00.jsonl.zst").read_bytes() for c in (corpus, again, other)
    )
    assert first == second
    assert first != third


def test_shards_of_another_seed_are_left_alone(corpus):
    folder = corpus.folders["profile"].parent
    before = [(corpus.folders[split] / "00.jsonl.zst").read_bytes() for split in corpus.folders]
    write_sample_corpus(folder)
    with pytest.raises(SampleCorpusError, match="has other documents"):
        write_sample_corpus(folder, seed=1)
    after = [(corpus.folders[split] / "00.jsonl.zst").read_bytes() for split in corpus.folders]
    assert after == before


def test_documents_compressed_otherwise_are_the_same_and_another_shard_is_refused(corpus, tmp_path):
    packed = (corpus.folders["profile"] / "00.jsonl.zst").read_bytes()
    shard = tmp_path / "profile" / "00.jsonl.zst"
    shard.parent.mkdir()
    content = zstandard.decompress(packed)
    shard.write_bytes(zstandard.compress(content, level=1))
    assert shard.read_bytes() != packed
    write_sample_corpus(tmp_path)
    assert shard.read_bytes() == packed
    for other in (packed[:-9], packed + zstandard.compress(b'{"text": "mine"}\n')):
        shard.write_bytes(other)
        with pytest.raises(SampleCorpusError, match=r"00\.jsonl\.zst has other documents"):
            write_sample_corpus(tmp_path)
    shard.rename(shard.with_name("01.jsonl.zst"))
    with pytest.raises(SampleCorpusError, match=r"01\.jsonl\.zst has other documents"):
        write_sample_corpus(tmp_path)


def test_the_answers_are_right():
    import random

    rng = random.Random(0)
    for _ in range(50):
        question, answer = EXERCISES["linear equation"](rng)
        left, right = question.removeprefix("Solve ").split(" for ")[0].split(" = ")
        name = question.rstrip(".")[-1]
        assert eval(left, {name: int(answer)}) == int(right), question
        question, answer = EXERCISES["base"](rng)
        assert int(answer, int(question.split()[-1][:-1])) == int(question.split()[2])


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        write_sample_corpus(tmp_path / "file")
