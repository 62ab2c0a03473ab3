"""What arms of the cluster benchmark measured: medians, gains, and a table."""

from __future__ import annotations

import statistics
from typing import Any

SUBJECT = "coherent/affinity"
REPLICAS = "coherent/replicas"
COMPUTE = ("start", "attention", "gate", "experts", "sampling")


def summarise(arms: list[dict[str, Any]], expected: list[list[int]]) -> dict[str, Any]:
    """Medians by arm, and what coherent/affinity gains over each; with replicas too if it ran."""
    rows = {arm["name"]: summarise_arm(arm, expected) for arm in arms}
    result: dict[str, Any] = {"requests": len(expected), "arms": rows}
    for subject, suffix in ((SUBJECT, ""), (REPLICAS, "_with_replicas")):
        if subject in rows:
            result["speedup" + suffix] = compare(rows, subject, "tokens_s", more_is_better=True)
            result["fewer_bytes" + suffix] = compare(
                rows, subject, "interface_bytes", more_is_better=False
            )
    return result


def compare(
    rows: dict[str, dict[str, Any]], subject: str, key: str, *, more_is_better: bool
) -> dict[str, float | None]:
    """What one arm gains over each other; None where either failed."""
    ours, gains = rows[subject], {}
    for name, row in rows.items():
        if name == subject:
            continue
        gain = None
        if not (row["failed"] or ours["failed"]) and row[key] and ours[key]:
            gain = ours[key] / row[key]
            gain = round(gain if more_is_better else 1 / gain, 3)
        gains[name.replace("/", "_")] = gain
    return gains


def summarise_arm(arm: dict[str, Any], expected: list[list[int]]) -> dict[str, Any]:
    """One arm: medians, the range of its rates, and whether it failed."""
    runs, failed = arm["runs"], arm["error"]
    if failed is None and any(run["tokens"] != expected for run in runs):
        failed = "tokens differ from the unsharded model's"
    if not runs:
        return {"failed": failed or "it did not run"}
    rates = [run["tokens_per_second"] for run in runs]
    row = {
        "failed": failed,
        "tokens_s": round(statistics.median(rates), 1),
        "tokens_s_range": [round(min(rates), 1), round(max(rates), 1)],
        "step_ms": statistics.median(run["ms"] for run in runs),
        "interface_bytes": round(arm["per_token"]["sent_bytes"], 1),
    }
    if arm["per_token"].get("trunk_bytes"):
        row["trunk_bytes"] = round(arm["per_token"]["trunk_bytes"], 1)
    return row | (summarise_counts(arm) if "own_bytes_per_token" in runs[0] else {})


def summarise_counts(arm: dict[str, Any]) -> dict[str, Any]:
    """What ours count themselves: bytes and rows between nodes or racks, and milliseconds a step."""
    runs, sent = arm["runs"], arm["per_token"]
    own = statistics.median(run["own_bytes_per_token"] for run in runs)
    between = sent.get("trunk_bytes") or sent["sent_bytes"]
    return {
        "ran": runs[0]["ran"],
        "dispatch": runs[0]["dispatch"],
        "own_bytes": round(own, 1),
        "interface_over_own": round(between / own, 4) if own else None,
        "rows_per_token": round(runs[0]["rows_per_token"], 3),
        "rows_between_per_token": round(runs[0]["rows_between"] / runs[0]["num_tokens"], 3),
        "as_predicted": all(run["measured_equals_predicted"] for run in runs),
        "ms": {
            part: round(statistics.median(run["ms_by_part"][part] for run in runs), 1)
            for part in runs[0]["ms_by_part"]
        },
    }


def ms_by_part(seconds: dict[str, float], steps: int) -> dict[str, float]:
    """Milliseconds a step of dispatch, combine, the share at the end, and all else."""
    parts = {part: seconds.get(part, 0.0) for part in ("dispatch", "combine", "share")}
    parts["compute"] = sum(seconds.values()) - sum(parts.values())
    return {part: 1000 * spent / max(1, steps) for part, spent in parts.items()}


def table(title: str, result: dict[str, Any]) -> str:
    """One model's arms as lines of text."""
    names = ("tokens/s", "step ms", "bytes a token", "/ own", "rows across", "speedup")
    lines = [title, f"  {'arm':20}" + "".join(f"{name:>14}" for name in names)]
    for arm, row in result["arms"].items():
        if row["failed"]:
            lines.append(f"  {arm:20}  failed: {row['failed']}")
            continue
        cells = (
            f"{row['tokens_s']:.0f}",
            f"{row['step_ms']:.1f}",
            f"{row.get('trunk_bytes') or row['interface_bytes']:.0f}",
            row.get("interface_over_own") or "",
            row.get("rows_between_per_token", ""),
            result.get("speedup", {}).get(arm.replace("/", "_")) or "",
        )
        ran = f"  {row['ran']}" if arm.startswith("auto/") else ""
        lines.append(f"  {arm:20}" + "".join(f"{cell:>14}" for cell in cells) + ran)
    return "\n".join(lines)
