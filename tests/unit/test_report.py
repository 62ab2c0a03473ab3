"""The report: one file, well formed, that says what the traffic model counts."""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

import placement.cli
from exflow.report import svg
from exflow.report.figures import ReportError, Run, gather
from exflow.report.heat import COLOUR, png
from exflow.report.page import render
from placement.plan import PlacementPlan, Strategy
from placement.topology import Topology
from placement.trace import RoutingTrace
from placement.traffic import count_traffic


class Checker(HTMLParser):
    """Notes unbalanced tags, text and what each tag refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.references: list[str] = []
        self.unnamed = 0

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.references += [v for k, v in attrs if k in ("src", "href")]
        if tag == "svg":
            self.unnamed += not named.get("aria-label")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.references += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def make_trace(model="toy/moe", *, tokens=3000, seed=0, domains=("code", "prose")) -> RoutingTrace:
    """Top-2 of eight experts: pairs follow pairs, most of the time."""
    rng = np.random.default_rng(seed)
    pair = rng.integers(0, 4, (tokens, 3))
    pair[:, 1:] = np.where(rng.random((tokens, 2)) < 0.8, (pair[:, :1] + 1) % 4, pair[:, 1:])
    ids = np.stack([pair, pair + 4], axis=2).astype(np.int16)
    return RoutingTrace(
        expert_ids=ids,
        sequence_ids=(np.arange(tokens) // 25).astype(np.int32),
        num_experts=8,
        model=model,
        layer_ids=(1, 2, 3),
        domain_ids=(np.arange(tokens) // 25 % 2).astype(np.uint8),
        domains=domains,
        phase="teacher-forced",
    )


def pair_plan(trace: RoutingTrace, ranks=4) -> PlacementPlan:
    """Expert e and e + 4 share rank e."""
    return PlacementPlan.from_rank_of_expert(
        np.tile(np.arange(8) % 4 % ranks, (3, 1)),
        topology=Topology(num_nodes=1, ranks_per_node=ranks),
        model=trace.model,
        layer_ids=trace.layer_ids,
        strategy=Strategy(name="affinity"),
    )


def metrics(**changes) -> dict:
    found = {
        "model": "toy/moe",
        "strategy": "affinity",
        "protocol": "coherent",
        "world_size": 4,
        "tokens_per_second": 123.4,
        "rows_per_token": {"dispatch": 1.5, "combine": 0.5, "total": 2.0},
        "predicted": {"rows_per_token": {"total": 2.0}, "imbalance": {"mean": 1.25}},
        "measured_equals_predicted": True,
        "phases": {"decode": {"seconds": {"attention": 1.0, "dispatch": 0.25, "share": 0.125}}},
    }
    return found | changes


@pytest.fixture
def files(tmp_path):
    """A profile, a plan, a held-out trace and metrics."""
    trace = make_trace()
    trace.save(tmp_path / "trace.safetensors")
    make_trace(seed=1, tokens=500).save(tmp_path / "held.safetensors")
    pair_plan(trace).save(tmp_path / "plan.json")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()), encoding="utf-8")
    return tmp_path


def all_figures(files):
    return gather(
        [files / "trace.safetensors"],
        [files / "plan.json"],
        held_out=[files / "held.safetensors"],
        metrics=[files / "metrics.json"],
    )


def test_the_page_is_well_formed_and_needs_nothing_else(files):
    page = render(all_figures(files))
    checker = checked(page)
    assert checker.unnamed == 0
    assert all(ref.startswith(("#", "data:")) for ref in checker.references)
    assert "http" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert len(page) < 200_000


def test_the_rows_shown_are_those_of_the_traffic_model(files):
    (model,) = all_figures(files)
    plan = PlacementPlan.load(files / "plan.json")
    held_out = RoutingTrace.load(files / "held.safetensors")
    for arm in model.arms:
        if arm.plan_name == "affinity":
            counted = count_traffic(held_out, plan, protocol=arm.protocol)
            np.testing.assert_array_equal(arm.traffic.dispatch, counted.dispatch)
    assert [arm.label for arm in model.arms] == [
        "home/linear",
        "coherent/linear",
        "home/affinity",
        "coherent/affinity",
    ]
    text = " ".join(checked(render([model])).text)
    assert f"{model.best.rows:.1f} rows per token" in text
    assert model.best.label == "coherent/affinity"
    assert "500 tokens that the plans have not seen" in text
    assert "code" in text


def test_without_plan_or_held_out_text_it_says_so(files):
    (model,) = gather([files / "trace.safetensors"], [])
    text = " ".join(checked(render([model])).text)
    assert "which the plans were fitted to" in text
    assert "Measured while decoding" not in text


def test_models_keep_their_own_plans(files, tmp_path):
    other = make_trace("toy/other", domains=("a", "b"))
    other.save(tmp_path / "other.safetensors")
    replace(pair_plan(other), strategy=Strategy(name="metis")).save(tmp_path / "metis.json")
    one, two = gather(
        [files / "trace.safetensors", tmp_path / "other.safetensors"],
        [tmp_path / "metis.json", files / "plan.json"],
    )
    assert list(one.plans) == ["linear", "affinity"]
    assert list(two.plans) == ["linear", "metis"]
    checked(render([one, two]))


def test_names_are_escaped(files):
    trace = make_trace("a<b>&c", domains=("<i>", '"quoted"'))
    trace.save(files / "odd.safetensors")
    page = render(gather([files / "odd.safetensors"], []))
    checked(page)
    assert "<i>" not in page
    assert "a<b>" not in page


def test_measured_runs_are_shown_against_the_prediction(files):
    text = " ".join(checked(render(all_figures(files))).text)
    assert "Measured while decoding" in text
    assert "123" in text
    assert "yes" in text
    wrong = Run.load(files / "metrics.json")
    assert wrong.seconds == {"attention": 1.0, "dispatch": 0.25, "share": 0.125}


def test_files_that_do_not_belong_together_are_refused(files, tmp_path):
    trace = files / "trace.safetensors"
    with pytest.raises(ReportError, match="second trace of toy/moe; give one --trace a model"):
        gather([trace, files / "held.safetensors"], [])
    replace(pair_plan(make_trace()), model="toy/unknown").save(tmp_path / "unknown.json")
    with pytest.raises(ReportError, match="is of toy/unknown, profiled were: toy/moe"):
        gather([trace], [tmp_path / "unknown.json"])
    pair_plan(make_trace(), ranks=2).save(tmp_path / "two.json")
    with pytest.raises(ReportError, match="different machines"):
        gather([trace], [files / "plan.json", tmp_path / "two.json"])
    (tmp_path / "bad.json").write_text('{"model": "toy/moe"}', encoding="utf-8")
    with pytest.raises(ReportError, match=r"bad.json: not metrics of `exflow run --metrics`"):
        gather([trace], [], metrics=[tmp_path / "bad.json"])


def test_the_command_writes_the_file(files):
    app = placement.cli.make_app("test")
    placement.cli.mount(app, {"report": "exflow.commands.report"})
    output = files / "out" / "report.html"
    result = CliRunner().invoke(
        app,
        ["report", "--trace", str(files / "trace.safetensors"), "-o", str(output)],
    )
    assert result.exit_code == 0, result.output
    assert output.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_png_holds_one_colour_with_the_values_as_opacity():
    data = png(np.array([[0.0, 1.0], [0.5, 0.2]]))
    assert struct.unpack(">II", data[16:24]) == (2, 2)
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    rows = zlib.decompress(data[start + 4 : start + 4 + length])
    assert rows == b"".join(
        b"\0" + b"".join(bytes([*COLOUR, alpha]) for alpha in row) for row in ((0, 255), (128, 51))
    )


def test_bars_are_as_long_as_their_values():
    rows = [svg.Bar(label="a", parts=[3.0, 1.0]), svg.Bar(label="b", parts=[1.0, 1.0])]
    chart = svg.bars("t", rows, ["x", "y"])
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="23.0"', chart)]
    assert widths[0] == pytest.approx(3 * widths[1], rel=0.01)
    assert widths[0] + widths[1] == pytest.approx(2 * (widths[2] + widths[3]), rel=0.01)


def test_a_line_starts_at_zero_and_ends_at_its_last_value():
    line = svg.Line(name="n", xs=[1, 2, 4], ys=[0, 5, 10])
    chart = svg.lines("t", [line], x_label="x", y_label="y", is_log=True)
    points = re.search(r'd="M([^"]*)" class="line l0"', chart)[1].split("L")
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split())) for p in points)
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert y0 == 270 - 42
    assert y2 == 26
