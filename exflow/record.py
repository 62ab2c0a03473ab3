"""Record routed experts from a running OpenAI-compatible server, prompt by prompt.

vLLM and SGLang return the experts of every token when started with --enable-return-routed-experts.
`record` sends prompts, and appends a JSON line an answer: what `exflow import` reads. A file that
is there already is gone on with: prompts it has answers to are not sent again.
"""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from placement.errors import UserError
from placement.json_text import JsonError, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future
    from pathlib import Path
    from typing import BinaryIO

ENGINES = ("vllm", "sglang")
RETRIES = 4
BEGINNING = b'{"id":'
FIELDS = {"id", "engine", "routed_experts"}

logger = logging.getLogger(__name__)


class ServerError(UserError):
    """A server that cannot be reached or does not return routed experts."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to send.

    Attributes:
        name: identifies it in the record, so that it is not sent twice.
        text: the prompt.
        domain: the text's domain; empty if unknown.
    """

    name: str
    text: str
    domain: str = ""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server and what to ask of it.

    Attributes:
        url: its address, as http://localhost:8000.
        engine: "vllm" or "sglang".
        model: the name it serves the model by.
        max_tokens: tokens to generate after each prompt.
        timeout: seconds to wait for an answer.
    """

    url: str
    engine: str
    model: str
    max_tokens: int = 128
    timeout: float = 600.0

    def complete(self, prompt: Prompt) -> dict[str, Any]:
        """The line to keep of the answer to a prompt, greedy.

        Raises:
            ServerError: naming the prompt.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt.text,
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
        }
        if self.engine == "sglang":
            body["return_routed_experts"] = True
        answer = _call(f"{self.url}/v1/completions", body, self.timeout, f"prompt {prompt.name}")
        return _line(prompt, self, answer)


def find_server(
    url: str, *, model: str | None = None, max_tokens: int = 128, timeout: float = 600.0
) -> Server:
    """Ask a server what it is.

    Raises:
        ServerError: if it is not there, serves another model, or is neither vLLM nor SGLang.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        msg = f"--server {url!r} must be an address such as http://localhost:8000"
        raise ServerError(msg)
    listing = _call(f"{url}/v1/models", None, min(timeout, 30.0), "the list of models")
    models = {str(m["id"]): str(m.get("owned_by", "")) for m in listing.get("data", [])}
    chosen = model or next(iter(models), "")
    if chosen not in models:
        msg = f"{url} serves {', '.join(models) or 'no model'}, not {chosen!r}; see --model"
        raise ServerError(msg)
    owner = models[chosen].lower()
    if owner not in ENGINES:
        msg = f"{url} is run by {owner or 'an unknown engine'}; only vLLM and SGLang return routing"
        raise ServerError(msg)
    return Server(url=url, engine=owner, model=chosen, max_tokens=max_tokens, timeout=timeout)


def record(
    server: Server,
    prompts: Iterable[Prompt],
    output: Path,
    *,
    concurrency: int = 8,
    on_answer: Callable[[int], None] = lambda count: None,
) -> int:
    """Send the prompts that `output` has no answer to yet, and append the answers.

    Args:
        server: from `find_server`.
        prompts: in the order to send them.
        output: a JSON Lines file; a half-written last line is dropped.
        concurrency: requests in flight.
        on_answer: called with 1 for every answer, and once with those that were there.

    Returns:
        Answers added.

    Raises:
        ServerError: at the first prompt that fails; what was answered is kept.
    """
    done = read_done(output)
    on_answer(len(done))
    left = (prompt for prompt in prompts if prompt.name not in done)
    added = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file, ThreadPoolExecutor(concurrency) as pool:
        for line in _answers(pool, server, left, concurrency):
            _append(file, line)
            on_answer(1)
            added += 1
    return added


def read_done(output: Path) -> set[str]:
    """Names of the prompts a record has answers to; a torn last line is cut off."""
    if not output.exists():
        return set()
    done: set[str] = set()
    whole = 0
    with output.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and _is_torn(line):
                break
            done.add(_name_of(line, f"{output}, line {number}"))
            whole += len(line)
        file.truncate(whole)
    return done


def _is_torn(line: bytes) -> bool:
    """Whether a line without its end is an answer, or the beginning of one."""
    try:
        return set(parse_json(line)) >= FIELDS
    except JsonError:
        return line.startswith(BEGINNING[: len(line)])
    except TypeError:
        return False


def _name_of(line: bytes, place: str) -> str:
    try:
        answer = parse_json(line)
        is_answer = set(answer) >= FIELDS
    except (JsonError, TypeError):
        is_answer = False
    if not is_answer:
        msg = f"{place}: not a line of `exflow record`; name another output file"
        raise ServerError(msg)
    return str(answer["id"])


def _append(file: BinaryIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    file.flush()


def _answers(
    pool: ThreadPoolExecutor, server: Server, prompts: Iterator[Prompt], concurrency: int
) -> Iterator[dict[str, Any]]:
    """Answers as they come, with `concurrency` requests in flight."""
    flying: set[Future[dict[str, Any]]] = set()
    try:
        while True:
            wanted = concurrency - len(flying)
            flying |= {pool.submit(server.complete, prompt) for prompt in islice(prompts, wanted)}
            if not flying:
                return
            landed, flying = wait(flying, return_when=FIRST_COMPLETED)
            for future in landed:
                yield future.result()
    finally:
        for future in flying:
            future.cancel()


def _line(prompt: Prompt, server: Server, answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices") or [{}]
    routed = choices[0].get("routed_experts") or (answer.get("sglext") or {}).get("routed_experts")
    routed = routed or (choices[0].get("sgl_ext") or {}).get("routed_experts")
    if not routed:
        msg = (
            f"prompt {prompt.name}: {server.url} answered without routed experts; start it with "
            f"--enable-return-routed-experts"
        )
        raise ServerError(msg)
    usage = answer.get("usage") or {}
    return {
        "id": prompt.name,
        "engine": server.engine,
        "model": server.model,
        "domain": prompt.domain,
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "routed_experts": routed,
    }


def _call(url: str, body: dict[str, Any] | None, timeout: float, what: str) -> dict[str, Any]:
    """GET, or POST a JSON body; busy or starting servers are asked again."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    for attempt in range(RETRIES):
        try:
            request = urllib.request.Request(url, data=data, headers=headers)
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return _json_object(response.read(), url)
        except urllib.error.HTTPError as error:
            if error.code not in {429, 500, 502, 503} or attempt == RETRIES - 1:
                detail = error.read().decode(errors="replace")[:200]
                msg = f"{what}: {url} answered {error.code}: {detail}"
                raise ServerError(msg) from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if attempt == RETRIES - 1:
                msg = f"{what}: {url} cannot be reached: {error}; is the server up?"
                raise ServerError(msg) from error
        logger.info("%s: asked again", what)
        time.sleep(0.5 * 2**attempt)
    raise AssertionError


def _json_object(data: bytes, url: str) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except ValueError as error:
        msg = f"{url} did not answer with JSON: {data[:80]!r}"
        raise ServerError(msg) from error
    if not isinstance(answer, dict):
        msg = f"{url} answered with {type(answer).__name__}, an object was expected"
        raise ServerError(msg)
    return answer
