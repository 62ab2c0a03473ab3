"""Measure decode on the ranks of this job: `home` and `coherent`, experts in order and as planned.

All arms decode the same prompts in one process group, repeats interleaved, so that what disturbs
the machine disturbs all of them. Only decode steps are timed; prompts are read before.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exflow.models.checkpoint import Checkpoint
from exflow.runtime.agreement import check_same
from exflow.runtime.decoder import Decoder
from exflow.runtime.engine import Engine
from exflow.runtime.metrics import PHASES, PhaseMetrics, join_phases
from exflow.runtime.model import ModelOptions, PreparedModel, prepare_model
from exflow.runtime.prompts import read_prompts
from exflow.runtime.ranks import Ranks
from exflow.runtime.requests import Request, SamplingParams
from exflow.runtime.weights import load_weights
from placement.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from exflow.runtime.engine import EngineOptions
    from exflow.runtime.liveness import Liveness

WAITING = ("dispatch", "combine", "share")


class BenchError(UserError):
    """A measurement that makes no sense."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured.

    Attributes:
        model: which model and, if there is one, its plan; its protocol is not used.
        prompts: the file of prompts, all of them in flight at once unless a batch size is given.
        new_tokens: of each request.
        repeats: of each arm.
        batch_size: requests in flight; None for all.
    """

    model: ModelOptions
    prompts: Path
    new_tokens: int = 33
    repeats: int = 3
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.new_tokens < 2:
            msg = (
                f"--new-tokens must be at least 2, got {self.new_tokens}: a request's first token "
                "comes with its prompt, and only decode steps are measured"
            )
            raise BenchError(msg)
        for name, count in (("repeats", self.repeats), ("batch-size", self.batch_size)):
            if count is not None and count < 1:
                msg = f"--{name} must be at least 1, got {count}"
                raise BenchError(msg)


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One way to decode, loaded."""

    name: str
    engine: Engine
    runs: list[dict[str, Any]]

    def where(self) -> str:
        """What is going on, for messages."""
        return f"{self.name}, {self.engine.step}"


def run_bench(bench: Bench) -> dict[str, Any]:
    """Measure all arms on this process's rank; all ranks of the job do the same.

    Returns:
        The same on every rank: `arms` with medians, and `tokens_identical`.

    Raises:
        UserError: on every rank, if any of them cannot go on.
    """
    ranks = Ranks.from_environment()
    prompts = read_prompts(bench.prompts)
    engine = replace(bench.model.engine, batch_size=bench.batch_size or len(prompts))
    plans = {"linear": None} | ({"plan": bench.model.plan} if bench.model.plan else {})
    prepared = {
        name: prepare_model(replace(bench.model, plan=plan, engine=engine), ranks)
        for name, plan in plans.items()
    }
    first = prepared["linear"]
    params = SamplingParams(max_tokens=bench.new_tokens, ignore_eos=True)
    requests = [
        Request(
            index=prompt.index,
            id=prompt.id,
            prompt=prompt.text,
            token_ids=tuple(first.tokenizer(prompt.text, verbose=False)["input_ids"]),
            params=params,
        )
        for prompt in prompts
    ]
    given = {"prompts": requests, "new_tokens": bench.new_tokens, "repeats": bench.repeats}
    with ranks.connected(first.device, timeout=bench.model.timeout) as liveness, liveness.naming():
        with ranks.agreeing(first.device):
            checkpoint = Checkpoint(first.folder)
            for name, model in prepared.items():
                given |= {f"{name}/{key}": it for key, it in model.given(checkpoint).items()}
        check_same(given, ranks, first.device)
        arms = [
            arm for name, model in prepared.items() for arm in _load(name, model, ranks, engine)
        ]
        _measure(arms, requests, bench, ranks, first, liveness)
    return _summarise(arms, first, ranks, len(requests))


def _load(name: str, prepared: PreparedModel, ranks: Ranks, options: EngineOptions) -> list[Arm]:
    """Both protocols with one plan; they share its weights. `home` is never replicated."""
    with ranks.agreeing(prepared.device):
        weights = load_weights(
            Checkpoint(prepared.folder),
            prepared.definition,
            [layer[ranks.rank] for layer in prepared.plan.slots],
            dtype=prepared.dtype,
            device=prepared.device,
        )
        decoder = Decoder(prepared.definition, weights)
    coherent = replace(options, protocol="coherent")
    home = replace(options, protocol="home")
    if home.dispatch == "replicated":
        home = replace(home, dispatch="auto")
    return [
        Arm(
            name=f"{own.protocol}/{name}",
            engine=Engine(decoder, prepared.plan, ranks, options=own),
            runs=[],
        )
        for own in (home, coherent)
    ]


def _measure(
    arms: list[Arm],
    requests: list[Request],
    bench: Bench,
    ranks: Ranks,
    prepared: PreparedModel,
    liveness: Liveness,
) -> None:
    """One short run of each arm to warm up, then the repeats, the arms by turns."""
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    for repeat in range(-1, bench.repeats):
        for arm in arms:
            liveness.where = arm.where
            for phase in PHASES:
                counts = arm.engine.metrics[phase]
                arm.engine.metrics[phase] = PhaseMetrics(*counts.rows["dispatch"].shape)
            made = list(arm.engine.generate(requests, short if repeat < 0 else None))
            if all(done.finish_reason == "refused" for done in made):
                msg = f"nothing to measure: every prompt was refused, the first: {made[0].reason}"
                raise BenchError(msg)
            by_rank = ranks.gather(arm.engine.metrics["decode"].to_json(), prepared.device)
            if repeat >= 0:
                tokens = {done.request.index: list(done.token_ids) for done in made}
                arm.runs.append(_count(by_rank) | {"tokens": tokens})


def _count(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """One run: its rate, and what it sent for a token."""
    phase = join_phases(by_rank)
    spent = max(sum(rank["seconds"].values()) for rank in by_rank)
    tokens = max(1, phase["tokens"])
    seconds = phase["seconds"]
    whole = max(1e-12, sum(seconds.values()))
    shares = {part: seconds.get(part, 0.0) / whole for part in WAITING}
    return {
        "tokens_per_second": tokens / max(1e-12, spent),
        "step_ms": 1000 * spent / max(1, phase["steps"]),
        "rows_per_token": sum(
            sum(map(sum, layer)) for rows in phase["rows"].values() for layer in rows
        )
        / tokens,
        "bytes_per_token": sum(phase["bytes"].values()) / tokens,
        "messages_per_step": sum(phase["messages"].values()) / max(1, phase["steps"]),
        "shares": {"compute": 1 - sum(shares.values())} | shares,
    }


def _summarise(
    arms: list[Arm], prepared: PreparedModel, ranks: Ranks, num_requests: int
) -> dict[str, Any]:
    rows = {arm.name: _medians(arm.runs) for arm in arms}
    slowest = rows[arms[0].name]["tokens_per_second"]
    for row in rows.values():
        row["speedup"] = round(row["tokens_per_second"] / slowest, 3)
    tokens = [run["tokens"] for arm in arms for run in arm.runs]
    return {
        "model": prepared.definition.name,
        "ranks": ranks.num_ranks,
        "ranks_per_node": ranks.ranks_per_node,
        "requests": num_requests,
        "batch_size": prepared.engine.batch_size,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "device": prepared.device.type,
        "dispatch": prepared.engine.dispatch,
        "tokens_identical": all(made == tokens[0] for made in tokens),
        "arms": rows,
    }


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [run["tokens_per_second"] for run in runs]
    counted = ("rows_per_token", "bytes_per_token", "messages_per_step", "step_ms")
    shares = {
        part: round(statistics.median(run["shares"][part] for run in runs), 4)
        for part in runs[0]["shares"]
    }
    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "tokens_per_second_range": [round(min(rates), 1), round(max(rates), 1)],
        **{name: round(statistics.median(run[name] for run in runs), 3) for name in counted},
        "shares": shares,
    }


def format_table(result: dict[str, Any]) -> str:
    """What was measured, as lines of text."""
    names = ("tokens/s", "step ms", "rows", "bytes", "compute", "dispatch", "combine", "share", "x")
    lines = [f"{'':16}" + "".join(f"{name:>10}" for name in names)]
    for arm, row in result["arms"].items():
        cells = [f"{row['tokens_per_second']:.0f}", f"{row['step_ms']:.1f}"]
        cells += [f"{row['rows_per_token']:.2f}", f"{row['bytes_per_token']:.0f}"]
        cells += [f"{100 * share:.0f}%" for share in row["shares"].values()]
        cells.append(f"{row['speedup']:.2f}")
        lines.append(f"{arm:16}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append(
        f"rows and bytes: a token, sent to other ranks; x: over {next(iter(result['arms']))}; "
        f"{result['requests']} requests, {result['dispatch']} dispatch"
    )
    if not result["tokens_identical"]:
        lines.append("greedy tokens differ between arms: rounding, where two tokens are as likely")
    return "\n".join(lines)


def to_line(result: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(result)
