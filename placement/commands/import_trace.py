"""`exflow import`: an engine's recorded routing to a trace, or its placement file to a plan."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from placement.interop.model_shape import ModelShape
    from placement.trace import RoutingTrace


def import_trace(
    files: Annotated[
        list[Path], typer.Argument(help="Responses (.jsonl, .json, .npy), dumps (.pt) or a folder.")
    ],
    engine: Annotated[
        str, typer.Option("--from", help="vllm, sglang, trtllm, hf or npy; a target with --plan.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace, or plan, to write.")],
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json, or the folder it is in.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name.")] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="Instead of --config.")] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Instead of --config.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Instead of --config.")] = None,
    moe_layers: Annotated[
        str | None, typer.Option(help="Instead of --config: layers with experts, as 1-26 or 1,3,5.")
    ] = None,
    phase: Annotated[str, typer.Option(help="Tokens to keep: all, prefill or decode.")] = "all",
    licence: Annotated[str, typer.Option(help="Of the text; written into the trace.")] = "",
    as_plan: Annotated[
        bool, typer.Option("--plan", help="The file is a placement: write a plan.")
    ] = False,
    nodes: Annotated[int, typer.Option(help="With --plan: nodes of the cluster.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(help="With --plan: ranks of a node.")] = 1,
) -> None:
    """Import what an engine recorded as a trace, or the placement it runs as a plan."""
    from placement.interop.model_shape import ModelShape, parse_layers
    from placement.output import check_writable

    check_writable(output, inputs=[*files, config])
    shape = (ModelShape.from_config(config) if config else ModelShape()).filled(
        model=model,
        num_experts=num_experts,
        num_layers=num_layers,
        top_k=top_k,
        moe_layers=None if moe_layers is None else parse_layers(moe_layers),
    )
    if as_plan:
        _import_plan(files, engine, output, shape, nodes=nodes, ranks_per_node=ranks_per_node)
    else:
        _import_trace(files, engine, output, shape, phase=phase, licence=licence)


def _import_trace(
    files: list[Path], engine: str, output: Path, shape: ModelShape, *, phase: str, licence: str
) -> None:
    from dataclasses import replace

    from placement.interop.errors import RecordError
    from placement.interop.importers import read_trace
    from placement.interop.trace_parts import PHASES

    wanted = next((known for known in PHASES if known == phase), None)
    if wanted is None:
        msg = f"unknown phase {phase!r}; choose all, prefill or decode"
        raise RecordError(msg)
    start = time.perf_counter()
    trace = read_trace(engine, files, shape, phase=wanted)
    trace = replace(trace, licence=licence) if licence else trace
    trace.save(output)
    typer.echo(f"{output}: {_describe(trace)}, {time.perf_counter() - start:.1f} s")


def _describe(trace: RoutingTrace) -> str:
    from placement.trace import COUNTS

    if trace.phase == COUNTS:
        layers = f"{trace.num_layers} MoE layers of {trace.num_experts} experts"
        return f"loads of {layers}, for plans that balance load; affinity needs routed experts"
    return (
        f"{trace.num_tokens} tokens of {trace.num_sequences} sequences, {trace.num_layers} MoE "
        f"layers, top-{trace.top_k} of {trace.num_experts} experts"
    )


def _import_plan(
    files: list[Path],
    engine: str,
    output: Path,
    shape: ModelShape,
    *,
    nodes: int,
    ranks_per_node: int,
) -> None:
    from placement.interop.errors import ExportError
    from placement.interop.targets import read_export
    from placement.topology import Topology

    if len(files) != 1:
        msg = f"a plan is one file, {len(files)} were given"
        raise ExportError(msg)
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks_per_node)
    read = read_export(engine, files[0], shape, topology.num_ranks)
    plan = read.to_plan(topology, model=shape.model or "unknown", source=engine)
    plan.save(output)
    typer.echo(
        f"{output}: {plan.num_slots} slots on {plan.num_ranks} ranks, {plan.num_layers} MoE layers "
        f"of {plan.num_experts} experts"
    )
