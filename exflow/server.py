"""An OpenAI-compatible server that returns the experts of every token.

vLLM and SGLang do when started with --enable-return-routed-experts.
"""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from threading import Event
from typing import Any

from placement.errors import UserError
from placement.interop.request_files import find_routing
from placement.json_text import JsonError, parse_json

ENGINES = ("vllm", "sglang")
RETRIES = 4
BUSY = {408, 429, 500, 502, 503, 504}
REFUSED = {400, 413, 422}
LONGEST_TIMEOUT = 86400.0

logger = logging.getLogger(__name__)


class ServerError(UserError):
    """A server that cannot be reached or does not return routed experts."""


class RefusalError(ServerError):
    """A prompt that the server does not take, such as one that is too long; others it may."""


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

    def complete(self, prompt: Prompt, *, stop: Event | None = None) -> dict[str, Any]:
        """The line to keep of the answer to a prompt, greedy.

        Args:
            prompt: what to send.
            stop: once set, a server that is busy or cannot be reached is not asked again.

        Raises:
            RefusalError: the server does not take this prompt.
            ServerError: anything else; the prompt is named.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt.text,
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
        }
        if self.engine == "sglang":
            body["return_routed_experts"] = True
        url, what = f"{self.url}/v1/completions", f"prompt {prompt.name}"
        answer = _call(url, body, self.timeout, what, stop or Event())
        return _line(prompt, self, answer)


def find_server(
    url: str, *, model: str | None = None, max_tokens: int = 128, timeout: float = 600.0
) -> Server:
    """Ask a server what it is.

    Raises:
        ServerError: if it is not there, serves another model, or is neither vLLM nor SGLang.
    """
    url = _checked_url(url)
    if not 0 < timeout <= LONGEST_TIMEOUT:
        msg = f"--timeout {timeout:g} must be above 0 and at most {LONGEST_TIMEOUT:g} seconds"
        raise ServerError(msg)
    listing = _call(f"{url}/v1/models", None, min(timeout, 30.0), "the list of models", Event())
    models = _models(listing, url)
    chosen = model or next(iter(models), "")
    if chosen not in models:
        msg = f"{url} serves {', '.join(models) or 'no model'}, not {chosen!r}; see --model"
        raise ServerError(msg)
    owner = models[chosen].lower()
    if owner not in ENGINES:
        msg = f"{url} is run by {owner or 'an unknown engine'}; only vLLM and SGLang return routing"
        raise ServerError(msg)
    return Server(url=url, engine=owner, model=chosen, max_tokens=max_tokens, timeout=timeout)


def _checked_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname)
        is_address = is_address and parts.port != 0 and url.isascii() and " " not in url
    except ValueError:  # a port that is no number, half an IPv6 address
        is_address = False
    if not is_address or not url.isprintable():
        msg = f"--server {url!r} must be an address such as http://localhost:8000"
        raise ServerError(msg)
    return url.rstrip("/").removesuffix("/v1")


def _models(listing: dict[str, Any], url: str) -> dict[str, str]:
    """Who runs each model of the answer to /v1/models."""
    try:
        return {str(m["id"]): str(m.get("owned_by", "")) for m in listing["data"]}
    except (KeyError, TypeError, AttributeError) as error:
        msg = f"{url}/v1/models is no list of models; is it an OpenAI-compatible server?"
        raise ServerError(msg) from error


def _line(prompt: Prompt, server: Server, answer: dict[str, Any]) -> dict[str, Any]:
    routed = next(find_routing(answer), None)
    if not routed or not isinstance(routed, str):
        msg = (
            f"prompt {prompt.name}: {server.url} answered without routed experts; start it with "
            f"--enable-return-routed-experts"
        )
        raise ServerError(msg)
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return {
        "id": prompt.name,
        "prompt": prompt.text,
        "engine": server.engine,
        "model": server.model,
        "domain": prompt.domain,
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "routed_experts": routed,
    }


def _call(
    url: str, body: dict[str, Any] | None, timeout: float, what: str, stop: Event
) -> dict[str, Any]:
    """GET, or POST a JSON body; busy or starting servers are asked again until `stop` is set."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    for attempt in range(RETRIES):
        if attempt:
            if stop.wait(0.5 * 2 ** (attempt - 1)):
                break
            logger.info("%s: asked again", what)
        try:
            status, content = _fetch(request, timeout)
        except (OSError, HTTPException, UnicodeError) as error:  # UnicodeError: a host's name
            failure = ServerError(f"{what}: {url} cannot be reached: {error!r}; is the server up?")
            continue
        if status == 200:
            return _json_object(content, f"{what}: {url}")
        detail = " ".join(content.decode(errors="replace").split())[:200]
        kind = RefusalError if body is not None and status in REFUSED else ServerError
        failure = kind(f"{what}: {url} answered {status}: {detail}")
        if status not in BUSY:
            break
    raise failure


def _fetch(request: urllib.request.Request, timeout: float) -> tuple[int, bytes]:
    """Status and content of an answer."""
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def _json_object(data: bytes, source: str) -> dict[str, Any]:
    try:
        answer = parse_json(data)
    except JsonError as error:
        msg = f"{source} did not answer with JSON: {data[:80]!r}"
        raise ServerError(msg) from error
    if not isinstance(answer, dict):
        msg = f"{source} answered with {type(answer).__name__}, an object was expected"
        raise ServerError(msg)
    return answer
