"""The report on affinity: heat maps before and after placement, its strength, its stability."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from exflow.report.heat import heat_map
from exflow.report.html import figure, side_by_side, table
from exflow.report.svg import Line, grid, lines
from placement.affinity import AffinityGraph, count_transitions
from placement.stability import kept

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from exflow.report.figures import ModelFigures
    from placement.plan import PlacementPlan

MOST_PLANS = 3


def heat_section(model: ModelFigures) -> str:
    """P(next | now) of three pairs of layers, experts in the order of each plan's ranks."""
    probabilities = AffinityGraph.from_trace(model.trace).probabilities()
    last = len(probabilities) - 1
    steps = sorted({0, last // 2, last})
    layers = model.trace.layer_ids
    parts = []
    for name, plan in list(model.plans.items())[:MOST_PLANS]:
        pictures = [
            _heat_figure(
                plan, probabilities[step], step, f"layer {layers[step]} → {layers[step + 1]}"
            )
            for step in steps
        ]
        title = "linear: experts as they are numbered" if name == "linear" else name
        parts.append(f"<h4>{escape(title)}</h4>{side_by_side(pictures)}")
    return (
        "<h3>Affinity before and after placement</h3>"
        "<p>A row is an expert, a column an expert of the next MoE layer; the stronger the colour, "
        "the likelier a token goes from one to the other. Experts are sorted by the rank that holds them, "
        "numbers are ranks. What lies in the blocks on the diagonal never leaves its rank: a good "
        "placement gathers colour there.</p>" + "".join(parts)
    )


def _heat_figure(
    plan: PlacementPlan, probability: NDArray[np.float64], step: int, layers: str
) -> str:
    here, after = first_hosts(plan)[step : step + 2]
    rows, columns = np.argsort(here, kind="stable"), np.argsort(after, kind="stable")
    stays = float((probability * (here[:, None] == after)).sum(axis=1).mean())
    title = f"Affinity, {layers}, experts in the order of plan {plan.strategy.name}"
    return figure(
        heat_map(
            title,
            probability[rows][:, columns],
            here[rows],
            after[columns],
            most=float(np.quantile(probability, 0.998)) or 1.0,
        ),
        f"{layers}: {stays:.0%} on the diagonal",
    )


def first_hosts(plan: PlacementPlan) -> NDArray[np.int64]:
    """(layers, experts) the lowest rank with a copy."""
    return np.asarray(plan.hosts().argmax(axis=2), dtype=np.int64)


def kept_share(model: ModelFigures, plan_name: str) -> float:
    """Share of the counted tokens' transitions (all pairs of choices) that stay on a rank."""
    return kept(first_hosts(model.plans[plan_name]), count_transitions(model.counted_on))


def strength_section(model: ModelFigures) -> str:
    """How strong the affinity is and how far it can be relied on."""
    pictures = [_information_figure(model), _convergence_figure(model.stability)]
    if model.stability["domains"] is not None:
        pictures.append(_domains_figure(model.stability["domains"]))
    return (
        "<h3>Is the affinity strong, and does it last?</h3>"
        f"{side_by_side(pictures)}{_statistics_table(model.affinity)}"
    )


def _information_figure(model: ModelFigures) -> str:
    """Mutual information by layer against its nulls."""
    found = model.affinity
    information = found["mutual_information"]["top1"]
    steps = model.trace.layer_ids[1:]
    chart = lines(
        "Mutual information of experts at adjacent layers",
        [
            Line(name="first choices", xs=steps, ys=information["per_layer"]),
            *(
                Line(name=label, xs=steps, ys=[information[null]] * len(steps), is_quiet=True)
                for null, label in (
                    ("null_within_sequence", "shuffled in sequence"),
                    ("null", "shuffled"),
                )
            ),
        ],
        x_label="MoE layer",
        y_label="normalised mutual information with the layer before",
    )
    caption = (
        "1: the expert of one layer settles the expert of the next; 0: it says nothing. The dotted "
        "lines are what is left when tokens are shuffled in each layer, among all tokens or only "
        "among those of their own text."
    )
    return figure(chart, caption, heading="How strong?")


def _statistics_table(found: dict[str, Any]) -> str:
    entries = [("load of experts, max / mean", found["load_skew"])]
    entries += [(name.replace("_", " "), x) for name, x in found["concentration"].items()]
    information = found["mutual_information"]
    entries.append(("mutual information, first choices", information["top1"]))
    if found["coactivation"] is not None:
        entries.append(("mutual information, all choices", information["topk"]))
        entries.append(("co-activation beyond load", found["coactivation"]))
    if found["foretold"] is not None:
        share, null = found["foretold"]["share"], found["foretold"]["null"]
        entries.append(
            ("first layer's choices foretold by the token alone", {"mean": share, "null": null})
        )
    names = ("mean", "min", "max", "null", "null_within_sequence")
    return table(
        ["statistic", "mean", "min", "max", "shuffled", "shuffled in sequence"],
        [[label, *(x.get(name, "") for name in names)] for label, x in entries],
        caption="Over layers; definitions in placement/statistics.py",
    )


def _convergence_figure(found: dict[str, Any]) -> str:
    """What few tokens tell, and the agreement of the two halves."""
    rows = found["convergence"]
    sizes = [row["tokens"] for row in rows]
    chart = lines(
        "What few tokens tell",
        [
            Line(name=label, xs=sizes, ys=[row[name] for row in rows])
            for name, label in (("correlation", "correlation"), ("kept", "kept on the rank"))
        ]
        + [
            Line(
                name="kept by chance", xs=sizes, ys=[1 / found["ranks"]] * len(rows), is_quiet=True
            )
        ],
        x_label="tokens fitted",
        y_label="on held-out tokens",
        is_log=True,
        y_max=1.0,
    )
    halves = found["halves"]
    return figure(
        chart,
        "Fitted on the first tokens of one half of the texts, measured on the other half. "
        "Correlation: of the affinities beyond load. Kept: share of transitions that stay on one "
        f"of {found['ranks']} ranks under a quick placement fitted on those tokens. The whole half: "
        f"correlation {halves['correlation']:.2f}, kept {halves['kept']:.2f}.",
        heading="With how many tokens?",
    )


def _domains_figure(found: dict[str, Any]) -> str:
    names = [escape(name) for name in found["names"]]
    numbers = [str(number + 1) for number in range(len(names))]
    chart = grid(
        "Correlation of affinity between kinds of text",
        found["correlation"],
        rows=[f"{number} {name}" for number, name in zip(numbers, found["names"], strict=True)],
        columns=numbers,
        most=1.0,
        digits=2,
    )
    return figure(
        chart,
        "Correlation of affinity fitted on one kind (down) and measured on another (across). The "
        "diagonal compares two halves of one kind: as good as it gets with so few tokens. A placement fitted on another kind keeps "
        f"{found['transfer']:.0%} of what one fitted on its own kind does.",
        heading="From one kind of text to another?",
    )
