"""`exflow record` against servers faked here, which answer as vLLM and SGLang do."""

import base64
import gzip
import io
import json
import os
import resource
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from exflow import record as recording
from exflow import server as serving
from exflow.commands.record import record as record_command
from exflow.corpus import CorpusError
from exflow.prompts import read_prompts
from exflow.record import read_done, record
from exflow.server import Prompt, RefusalError, ServerError, find_server
from placement.interop.importers import read_trace
from placement.interop.model_shape import ModelShape
from placement.output import OutputError

SHAPE = ModelShape(num_layers=2, moe_layers=(0, 1), num_experts=8, top_k=2)
PROMPTS = [Prompt(name=f"p{i}", text=f"text {i}", domain="Github") for i in range(6)]


def routing_of(text):
    rng = np.random.default_rng(len(text) + sum(text.encode()))
    return np.argsort(rng.random((5, 2, 8)), axis=2)[:, :, :2]


def vllm_body(text):
    buffer = io.BytesIO()
    np.save(buffer, routing_of(text).astype(np.uint8))
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"choices": [{"text": "", "routed_experts": encoded}], "usage": {"prompt_tokens": 3}}


def sglang_body(text):
    encoded = base64.b64encode(routing_of(text).astype("<i4").tobytes()).decode()
    return {
        "choices": [{"text": ""}],
        "usage": {"prompt_tokens": 3},
        "sglext": {"routed_experts": encoded},
    }


@contextmanager
def serve(engine, *, answer=None, models=None, status=lambda text: 200):
    """A server on a free port; gives its address and the prompts it was sent."""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, models or {"data": [{"id": "toy", "owned_by": engine}]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent.append(request)
            if (code := status(request["prompt"])) != 200:
                self.reply(code, {"error": "context length exceeded"})
                return
            body = {"vllm": vllm_body, "sglang": sglang_body}[engine]
            self.reply(200, (answer or body)(request["prompt"]))

        def reply(self, code, body):
            if isinstance(body, bytes):  # not even HTTP
                self.wfile.write(body)
                return
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_is_recorded_imports_as_the_routing_the_server_returned(tmp_path, engine):
    output = tmp_path / "r.jsonl"
    with serve(engine) as (url, sent):
        server = find_server(url)
        assert record(server, PROMPTS, output, concurrency=1) == 6
    trace = read_trace(engine, [output], SHAPE)
    expected = np.concatenate([routing_of(prompt.text) for prompt in PROMPTS])
    assert np.array_equal(trace.expert_ids, expected)
    assert (trace.model, trace.domains, trace.num_sequences) == ("toy", ("Github",), 6)
    assert all(
        request.get("return_routed_experts", False) == (engine == "sglang") for request in sent
    )


def test_a_record_is_gone_on_with_and_a_torn_line_is_asked_again(tmp_path):
    output = tmp_path / "r.jsonl"
    with serve("vllm") as (url, sent):
        server = find_server(url)
        record(server, PROMPTS[:3], output, concurrency=1)
        output.write_bytes(output.read_bytes()[:-20])
        counted = []
        assert record(server, PROMPTS, output, on_answer=counted.append) == 4
        assert counted[0] == 2
        assert len(sent) == 7
    assert read_trace("vllm", [output], SHAPE).num_sequences == 6


def names_in(output):
    return {json.loads(line)["id"] for line in output.read_text().splitlines()}


def test_a_refused_prompt_is_named_the_others_go_on_and_the_next_run_tries_it_again(tmp_path):
    output = tmp_path / "r.jsonl"
    with serve("vllm", status=lambda text: 400 if text in {"text 0", "text 3"} else 200) as (
        url,
        sent,
    ):
        for times in (6, 8):
            with pytest.raises(RefusalError, match=r"2 of \d prompts.* p0: .*400.*length.* p3: "):
                record(find_server(url), PROMPTS, output, concurrency=1)
            assert len(sent) == times
    assert names_in(output) == {"p1", "p2", "p4", "p5"}


def test_answers_on_their_way_are_kept_when_another_prompt_fails(tmp_path):
    output, failed = tmp_path / "r.jsonl", threading.Event()

    def status(text):
        if text == "text 0":
            failed.wait(5)
            time.sleep(0.3)  # until the failure has arrived
            return 200
        failed.set()
        return 403

    with serve("vllm", status=status) as (url, sent):
        with pytest.raises(ServerError, match=r"prompt p1: .*403"):
            record(find_server(url), PROMPTS, output, concurrency=2)
        assert len(sent) == 2
    assert names_in(output) == {"p0"}


def test_ctrl_c_keeps_the_answers_on_their_way_and_ends_though_the_server_hangs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(recording, "PATIENCE", 0.5)
    output, over = tmp_path / "r.jsonl", threading.Event()

    def status(text):
        if text == "text 0":
            over.wait(20)
            return 200
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return 200

    with serve("vllm", status=status) as (url, _):
        with pytest.raises(KeyboardInterrupt):
            record(find_server(url), PROMPTS, output, concurrency=2)
        assert names_in(output) == {"p1"}
        over.set()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "read_done", lambda _: {})  # it would read /dev/full for ever
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    with serve("vllm") as (url, _), pytest.raises(OutputError, match=r"full\.jsonl: cannot be wri"):
        record(find_server(url), PROMPTS, tmp_path / "full.jsonl")


def test_an_answer_that_fits_no_more_leaves_no_half_line_before_the_next(tmp_path):
    output = tmp_path / "r.jsonl"
    prompts = [Prompt(name="long", text="x" * 500_000), Prompt(name="short", text="y")]
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def status(text):
        time.sleep(0.3 if text == "y" else 0)  # until the long one has failed
        return 200

    with serve("vllm", status=status) as (url, _):
        server = find_server(url)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, most))  # as a disk that is full
        try:
            with pytest.raises(OutputError, match=r"r\.jsonl: cannot be written: File too large"):
                record(server, prompts, output, concurrency=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        assert names_in(output) == {"short"}
        assert record(server, prompts, output) == 1


def test_an_error_of_the_progress_is_not_blamed_on_the_output(tmp_path):
    def on_answer(count):
        if count:
            raise BrokenPipeError

    with serve("vllm") as (url, _), pytest.raises(BrokenPipeError):
        record(find_server(url), PROMPTS, tmp_path / "r.jsonl", on_answer=on_answer)


def test_a_server_that_refuses_everything_is_given_up(tmp_path, caplog):
    prompts = [Prompt(name=f"p{i}", text=f"text {i}") for i in range(40)]
    said = r"the first 8 prompts were all refused.* prompt p0: .* 400: .*context length"
    with serve("vllm", status=lambda _: 400) as (url, sent):
        with pytest.raises(ServerError, match=said):
            record(find_server(url), prompts, tmp_path / "r.jsonl", concurrency=1)
        assert len(sent) == 8
    assert len([text for text in caplog.messages if text.startswith("refused")]) == 3


def test_a_record_with_answers_is_gone_on_with_past_many_refusals(tmp_path):
    prompts = [Prompt(name=f"p{i}", text=f"text {i}") for i in range(20)]
    output = tmp_path / "r.jsonl"
    with serve("vllm", status=lambda text: 200 if text == "text 19" else 400) as (url, sent):
        record(find_server(url), prompts[19:], output)
        with pytest.raises(RefusalError, match="19 of 19 prompts refused"):
            record(find_server(url), prompts, output, concurrency=1)
        assert len(sent) == 20


def test_after_a_failure_a_busy_server_is_not_asked_again(tmp_path):
    def status(text):
        time.sleep(0 if text == "text 0" else 0.3)  # until the failure has arrived
        return 403 if text == "text 0" else 503

    with serve("vllm", status=status) as (url, sent):
        with pytest.raises(ServerError, match=r"prompt p0: .*403"):
            record(find_server(url), PROMPTS, tmp_path / "r.jsonl", concurrency=2)
        assert len(sent) == 2


def test_prompts_cut_at_another_length_are_told_so(tmp_path):
    output = tmp_path / "r.jsonl"
    with serve("vllm") as (url, _):
        record(find_server(url), PROMPTS[:1], output)
        for text in ("text", "text 0 and more"):
            with pytest.raises(ServerError, match="p0 was recorded with another --max-characters"):
                record(find_server(url), [Prompt(name="p0", text=text)], output)


def test_the_command_writes_over_no_prompts_and_no_device(tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": 1, "prompt": "a"}\n')
    for output in (prompts, Path("/dev/null")):
        with pytest.raises(OutputError):
            record_command("http://localhost:1", [prompts], output)


def test_a_name_that_answers_another_prompt_is_refused(tmp_path):
    output = tmp_path / "r.jsonl"
    with serve("vllm") as (url, sent):
        record(find_server(url), PROMPTS[:2], output)
        other = [PROMPTS[1], Prompt(name="p0", text="another")]
        with pytest.raises(ServerError, match=r"another prompt with the id 'p0'; name another out"):
            record(find_server(url), other, output)
        assert len(sent) == 2


@pytest.mark.parametrize(
    "models", [{"data": ["x"]}, {"data": 5}, {"data": [{"name": "m"}]}, {"no": 1}, b"hello\r\n\r\n"]
)
def test_a_list_of_models_that_is_none_is_a_clear_error(models, monkeypatch):
    monkeypatch.setattr(serving, "RETRIES", 1)
    with serve("vllm", models=models) as (url, _), pytest.raises(ServerError, match="/v1/models"):
        find_server(url)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"choices": ["a"]}, "without routed experts"),
        ({"choices": {"a": 1}, "usage": "u"}, "without routed experts"),
        ({"choices": [{"routed_experts": 5}]}, "without routed experts"),
        (b"hello\r\n\r\n", "BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", "not answer with JSON"),
    ],
)
def test_odd_answers_name_the_prompt(tmp_path, monkeypatch, answer, said):
    monkeypatch.setattr(serving, "RETRIES", 1)
    with (
        serve("vllm", answer=lambda _: answer) as (url, _),
        pytest.raises(ServerError, match=f"prompt p0: .*{said}"),
    ):
        record(find_server(url), PROMPTS[:1], tmp_path / "r.jsonl")


def test_a_server_without_routed_experts_is_told_the_flag(tmp_path):
    with (
        serve("vllm", answer=lambda _: {"choices": [{"text": "x"}]}) as (url, _),
        pytest.raises(ServerError, match="--enable-return-routed-experts"),
    ):
        record(find_server(url), PROMPTS, tmp_path / "r.jsonl")


def test_other_engines_other_models_and_bad_addresses_are_refused(monkeypatch):
    monkeypatch.setattr(serving, "RETRIES", 1)
    with serve("llamacpp") as (url, _), pytest.raises(ServerError, match="only vLLM and SGLang"):
        find_server(url)
    with serve("vllm") as (url, _), pytest.raises(ServerError, match=r"serves toy, not 'other'"):
        find_server(url, model="other")
    for url in ("localhost:8000", "http://", "http://[", "http://h:port", "http://a b", "ftp://h"):
        with pytest.raises(ServerError, match="must be an address"):
            find_server(url)
    with pytest.raises(ServerError, match="cannot be reached"):
        find_server(f"http://{'a' * 99}.b")
    for timeout in (float("inf"), float("nan"), 0):
        with pytest.raises(ServerError, match="--timeout"):
            find_server("http://localhost:1", timeout=timeout)


def test_prompts_are_read_from_text_and_pile_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo two\n")
    line = {"text": "three", "meta": {"pile_set_name": "Github"}}
    lines = json.dumps(line) + '\n{"id": 7, "prompt": "four"}\n{"id": null, "prompt": "five"}\n'
    text, packed = tmp_path / "a.txt", tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.encode()))
    prompts = list(read_prompts([text, packed], max_characters=3))
    assert [(p.name, p.text, p.domain) for p in prompts] == [
        ("a.txt:1", "one", ""),
        ("a.txt:3", "two", ""),
        ("b.jsonl.gz:1", "thr", "Github"),
        ("7", "fou", ""),
        ("b.jsonl.gz:3", "fiv", ""),
    ]


def test_prompts_of_two_folders_have_names_of_their_own_and_an_id_is_used_once(
    tmp_path, monkeypatch
):
    files = [tmp_path / "x" / "a.txt", tmp_path / "y" / "a.txt"]
    for file in files:
        file.parent.mkdir()
        file.write_text("text\n")
    monkeypatch.chdir(tmp_path / "x")
    for typed in (files, [Path("a.txt"), Path("../y/a.txt")]):
        names = [prompt.name for prompt in read_prompts(typed, max_characters=9)]
        assert names == [f"{file.resolve()}:1" for file in files]
    with pytest.raises(ServerError, match="already that of"):
        list(read_prompts([files[0], Path("a.txt")], max_characters=9))
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}\n')
    with pytest.raises(ServerError, match=r"line 2: the id '1' is already that of .*, line 1"):
        list(read_prompts([lines], max_characters=9))


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("empty.txt", b"\n", "no prompts"),
        ("latin.txt", "caf\u00e9\n".encode("latin-1"), "line 1: not a prompt"),
        ("latin.jsonl", '{"prompt": "\u00e9"}'.encode("latin-1"), "line 1: not a prompt"),
        ("broken.jsonl.zst", b"(\xb5/\xfd junk", "cannot be read further"),
        ("broken.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n')[:-9], "cannot be read further"),
    ],
)
def test_a_file_without_readable_prompts_is_named(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ServerError, CorpusError), match=f"{name}.*{error}"):
        list(read_prompts([tmp_path / name], max_characters=9))


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[1]", '{"body": "x"}', '{"id": true, "prompt": "x"}', '{"text": "\\ud800"}'],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    (tmp_path / "b.jsonl").write_text(line + "\n")
    with pytest.raises(ServerError, match="line 1: not a prompt"):
        list(read_prompts([tmp_path / "b.jsonl"], max_characters=10))


@pytest.mark.parametrize(
    "content",
    ['{"important": "config"}', '{"id":1,"prompt":"a"}', '{"id": 1, "prompt": "a"}\n', "a"],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    output = tmp_path / "else.json"
    output.write_text(content)
    with pytest.raises(ServerError, match="not a line of `exflow record`"):
        read_done(output)
    assert output.read_text() == content


def test_an_answer_without_its_end_is_cut(tmp_path):
    output = tmp_path / "answers.jsonl"
    answer = '{"id":"a","engine":"vllm","routed_experts":"x"}'
    for torn in ("", '{"id":"b","en', "{", answer):
        output.write_text(f"{answer}\n{torn}")
        assert read_done(output) == {"a": None}
        assert output.read_text() == f"{answer}\n"
