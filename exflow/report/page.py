"""The page: sections of every model put together."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from exflow import __version__
from exflow.report.affinity import heat_section, kept_share, strength_section
from exflow.report.html import tiles
from exflow.report.runs import runs_section
from exflow.report.style import STYLE
from exflow.report.traffic import load_section, matrices_section, rows_section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exflow.report.figures import ModelFigures

WORDS = {
    "rank": "one process with its share of the experts, usually one GPU",
    "row": "one hidden vector sent from one rank to another",
    "owner": "the rank where a token is at a layer: its attention and gate run there",
    "home": "protocol: the owner of a token never changes; rows go out (dispatch) and back (combine)",
    "coherent": "protocol: every rank holds the K/V cache, so a token stays where most of its "
    "experts ran; with top-1 routing nothing needs to return",
    "linear": "plan: experts in the order of their numbers, the first ones on rank 0",
    "affinity": "plan: experts that follow one another or are used together share a rank",
    "load, imbalance": "routed (token, expert) pairs; the busiest rank over the mean",
    "kept": "share of the steps from an expert to one of the next layer that stay on the rank",
}


def render(models: Sequence[ModelFigures]) -> str:
    """The whole page."""
    names = " and ".join(model.name for model in models)
    links = "".join(
        f'<a href="#{_anchor(model.name)}">{escape(model.name)}</a>' for model in models
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Expert placement: {escape(names)}</title><style>{STYLE}</style></head><body>"
        '<header><p class="muted">ExFlow report</p><h1>Expert placement by affinity</h1>'
        '<p class="lead">Where the experts of a Mixture-of-Experts model are held settles how often '
        "its tokens must travel between GPUs. This page shows which experts follow one another, "
        "where a plan puts them, and what that saves.</p>"
        f'<nav aria-label="Models">{links}<a href="#words">Words</a></nav></header><main>'
        f"{''.join(_model(model) for model in models)}</main>{_words()}"
        f"<footer>Made by exflow {__version__} with <code>exflow report</code>; "
        "this file needs nothing else.</footer></body></html>\n"
    )


def _model(model: ModelFigures) -> str:
    return (
        f'<section><h2 id="{_anchor(model.name)}">{escape(model.name)}</h2>'
        f"{_headline(model)}{_profiled(model)}{rows_section(model)}{runs_section(model)}"
        f"{heat_section(model)}{matrices_section(model)}{load_section(model)}"
        f"{strength_section(model)}</section>"
    )


def _headline(model: ModelFigures) -> str:
    best, base = model.best, model.baseline
    saved = 1 - best.rows / base.rows if base.rows else 0.0
    where = "on text the plan has not seen" if model.is_held_out else "on the profiled text"
    if best is base:
        sentence = "No plan sends fewer rows than experts in order with tokens that return home."
    else:
        sentence = (
            f"Decoding with <b>{escape(best.label)}</b> sends <b>{best.rows:.1f} rows per token</b> "
            f"{where}, where {escape(base.label)} sends {base.rows:.1f}: <b>{saved:.0%} fewer</b>."
        )
    balance, even = best.traffic.imbalance()["mean"], base.traffic.imbalance()["mean"]
    kept = kept_share(model, best.plan_name), kept_share(model, "linear")
    return f'<p class="lead">{sentence}</p>' + tiles(
        [
            (f"\N{MINUS SIGN}{saved:.0%}", f"rows per token, {base.label} to {best.label}", "good"),
            (f"{best.rows:.1f}", f"rows per token, instead of {base.rows:.1f}", ""),
            (f"{balance:.2f}", f"load imbalance (linear: {even:.2f}; 1 is even)", ""),
            (
                f"{kept[0]:.0%}",
                f"of expert-to-expert steps stay on the rank (linear: {kept[1]:.0%})",
                "",
            ),
        ]
    )


def _profiled(model: ModelFigures) -> str:
    found, topology = model.affinity, model.baseline.traffic.load.shape[1]
    plan = model.plans["linear"]
    sentence = (
        f"{found['tokens']:,} tokens of {found['sequences']:,} texts ({escape(found['phase'])}), at "
        f"{len(found['layer_ids'])} MoE layers of {found['experts']} experts, of which each token "
        f"uses {found['top_k']}. Plans are for {topology} ranks on "
        f"{plan.topology.num_nodes} node{'s' if plan.topology.num_nodes > 1 else ''}."
    )
    sizes = {name: size for name, size in found["domains"].items() if size}
    chips = "".join(f"<li>{escape(name)} <b>{size:,}</b></li>" for name, size in sizes.items())
    listed = f'<ul class="chips" aria-label="Tokens by kind of text">{chips}</ul>' if sizes else ""
    return f"<h3>What was profiled</h3><p>{sentence}</p>{listed}"


def _words() -> str:
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in WORDS.items())
    return f'<section><h2 id="words">Words</h2><dl>{entries}</dl></section>'


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
