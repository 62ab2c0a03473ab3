"""`exflow record` against servers faked here, which answer as vLLM and SGLang do."""

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from exflow.prompts import read_prompts
from exflow.record import Prompt, ServerError, find_server, read_done, record
from placement.interop.importers import read_trace
from placement.interop.model_shape import ModelShape

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
def serve(engine, *, answer=None, fail_after=None):
    """A server on a free port; gives its address and the prompts it was sent."""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"data": [{"id": "toy", "owned_by": engine}]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent.append(request)
            if fail_after is not None and len(sent) > fail_after:
                self.reply(400, {"error": "context length exceeded"})
                return
            body = {"vllm": vllm_body, "sglang": sglang_body}[engine]
            self.reply(200, (answer or body)(request["prompt"]))

        def reply(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
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


def test_a_refused_prompt_is_named_and_what_was_answered_is_kept(tmp_path):
    output = tmp_path / "r.jsonl"
    with (
        serve("vllm", fail_after=2) as (url, _),
        pytest.raises(ServerError, match=r"prompt p2: .*400.*context length"),
    ):
        record(find_server(url), PROMPTS, output, concurrency=1)
    assert len(output.read_text().splitlines()) == 2


def test_a_server_without_routed_experts_is_told_the_flag(tmp_path):
    with (
        serve("vllm", answer=lambda _: {"choices": [{"text": "x"}]}) as (url, _),
        pytest.raises(ServerError, match="--enable-return-routed-experts"),
    ):
        record(find_server(url), PROMPTS, tmp_path / "r.jsonl")


def test_other_engines_other_models_and_bad_addresses_are_refused():
    with serve("llamacpp") as (url, _), pytest.raises(ServerError, match="only vLLM and SGLang"):
        find_server(url)
    with serve("vllm") as (url, _), pytest.raises(ServerError, match=r"serves toy, not 'other'"):
        find_server(url, model="other")
    with pytest.raises(ServerError, match="must be an address"):
        find_server("localhost:8000")


def test_prompts_are_read_from_text_and_pile_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo two\n")
    line = {"text": "three", "meta": {"pile_set_name": "Github"}}
    (tmp_path / "b.jsonl").write_text(json.dumps(line) + '\n{"id": 7, "prompt": "four"}\n')
    prompts = list(read_prompts([tmp_path / "a.txt", tmp_path / "b.jsonl"], max_characters=3))
    assert [(p.name, p.text, p.domain) for p in prompts] == [
        ("a.txt:1", "one", ""),
        ("a.txt:3", "two", ""),
        ("b.jsonl:1", "thr", "Github"),
        ("7", "fou", ""),
    ]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"body": "x"}'])
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
        assert read_done(output) == {"a"}
        assert output.read_text() == f"{answer}\n"
