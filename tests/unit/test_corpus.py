"""Corpora: what is read, how it is shared out, and how damage is reported."""

import gzip
import json

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from exflow.corpus import CorpusError, CorpusStats, find_shards, read_documents


def line(text, subset="Github"):
    return json.dumps({"text": text, "meta": {"pile_set_name": subset}})


def write_shard(path, lines):
    content = ("\n".join(lines) + "\n").encode()
    if path.name.endswith(".zst"):
        content = zstandard.compress(content)
    elif path.name.endswith(".gz"):
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.zst", ".jsonl.gz"])
def test_a_shard_of_every_kind_gives_its_documents(tmp_path, ending):
    shard = write_shard(tmp_path / f"00{ending}", [line("one"), "", line("two", "ArXiv")])
    documents = list(read_documents([shard]))
    assert [(d.text, d.subset, d.line, d.index) for d in documents] == [
        ("one", "Github", 1, 0),
        ("two", "ArXiv", 3, 1),
    ]
    assert documents[0].source == str(shard)


def test_lines_longer_than_a_chunk_come_whole(tmp_path, monkeypatch):
    texts = ["ä" * 50, "b" * 7, "c" * 200]
    shard = write_shard(tmp_path / "a.jsonl.zst", [line(text) for text in texts])
    monkeypatch.setattr("exflow.corpus.CHUNK_BYTES", 5)
    assert [d.text for d in read_documents([shard])] == texts


def test_an_archive_of_several_frames_is_read_to_its_end(tmp_path):
    shard = tmp_path / "a.jsonl.zst"
    frames = [zstandard.compress((line(text) + "\n").encode()) for text in ("one", "two")]
    shard.write_bytes(b"".join(frames))
    assert [d.text for d in read_documents([shard])] == ["one", "two"]


def test_folders_and_patterns_name_shards_once_and_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    b = write_shard(tmp_path / "b.jsonl", [line("b")])
    a = write_shard(tmp_path / "a.jsonl.gz", [line("a")])
    c = write_shard(tmp_path / "deep" / "c.jsonl.zst", [line("c")])
    (tmp_path / "README.md").write_text("not a shard")
    assert find_shards([tmp_path]) == [a, b, c]
    assert find_shards([str(tmp_path / "*.jsonl*"), b]) == [a, b]


def test_paths_that_name_no_shard_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CorpusError, match=r"notes\.txt: not a Pile-format shard"):
        find_shards([tmp_path / "notes.txt"])
    with pytest.raises(CorpusError, match="no Pile-format shards there"):
        find_shards([tmp_path])
    with pytest.raises(CorpusError, match="no corpus was given"):
        find_shards([])


def test_subsets_filter_and_are_listed_when_none_match(tmp_path):
    shard = write_shard(tmp_path / "a.jsonl", [line("one"), line("two", "ArXiv")])
    assert [(d.text, d.index) for d in read_documents([shard], subsets=["ArXiv"])] == [("two", 0)]
    with pytest.raises(CorpusError, match="subsets FreeLaw; the corpus has: ArXiv, Github"):
        list(read_documents([shard], subsets=["FreeLaw"]))


@given(num_documents=st.integers(1, 30), world_size=st.integers(1, 6))
def test_ranks_share_a_corpus_without_loss_or_overlap(tmp_path_factory, num_documents, world_size):
    texts = [str(i) for i in range(num_documents)]
    shard = write_shard(tmp_path_factory.mktemp("corpus") / "a.jsonl", [line(t) for t in texts])
    shares = [
        list(read_documents([shard], rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    together = sorted((d for share in shares for d in share), key=lambda d: d.index)
    assert [d.text for d in together] == texts
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ('{"meta": {"pile_set_name": "Github"}}', 'line 2: no string "text"'),
        ('{"text": 3, "meta": {"pile_set_name": "Github"}}', 'line 2: no string "text"'),
        ('{"text": "x"}', 'line 2: no string "meta.pile_set_name"'),
        ("[1, 2]", 'line 2: no string "text"'),
    ],
)
def test_a_bad_line_is_named_or_counted(tmp_path, bad, message):
    shard = write_shard(tmp_path / "a.jsonl", [line("one"), bad, line("two")])
    with pytest.raises(CorpusError, match=rf"a\.jsonl, {message}.*--skip-bad-lines"):
        list(read_documents([shard]))
    stats = CorpusStats()
    kept = list(read_documents([shard], skip_bad_lines=True, stats=stats))
    assert [d.text for d in kept] == ["one", "two"]
    assert len(stats.skipped) == 1
    assert stats.subsets == {"Github": 2}


def test_bytes_that_are_no_text_are_named(tmp_path):
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(line("one").encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(CorpusError, match="line 2: not UTF-8"):
        list(read_documents([shard]))


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz"])
def test_a_truncated_archive_is_an_error_with_file_and_line(tmp_path, ending):
    lines = [line(f"{i} " * 50 + str(hash(str(i)))) for i in range(2000)]
    whole = write_shard(tmp_path / f"a{ending}", lines).read_bytes()
    (tmp_path / f"a{ending}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=rf"a{ending}, line \d+: the file cannot be read"):
        list(read_documents([tmp_path], skip_bad_lines=True))


def test_an_archive_that_is_none_is_an_error(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"plain text")
    with pytest.raises(CorpusError, match="damaged zstandard data"):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_corpus_is_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CorpusError, match="the corpus holds no documents"):
        list(read_documents([tmp_path]))
