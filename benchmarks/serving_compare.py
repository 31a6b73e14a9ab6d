"""The rows of bench_serving.py as ratios, beside the planner's, counted ones, and table 18's."""

from __future__ import annotations

from typing import Any

import numpy as np
from serving_planned import Planned, bound, same

from cascadevl.planning.table18 import TABLE_18

_BASES = {
    "same hardware": "coupled",
    "vision core added": "coupled, one core",
    "plain transformers": "transformers",
}


def compare(rows: list[dict[str, Any]], planned: Planned) -> list[dict[str, Any]]:
    """Print all ratios, and give them.

    Args:
        rows: Measured.
        planned: The planner, fitted.
    """
    ratios = []
    for row in _cases(rows):
        for kind, base in _BASES.items():
            theirs = same(rows, row, base)
            if theirs and _is_compared(kind, row["side"]):
                ratios.append(_ratio(kind, rows, theirs, planned, row))
                print(_told(ratios[-1]))
    return ratios


def errors(rows: list[dict[str, Any]], planned: Planned) -> list[dict[str, Any]]:
    """Print by how much the planner is wrong about the requests a second of each row, and give it.

    Args:
        rows: Measured.
        planned: The planner, fitted.
    """
    found = []
    for row in _cases(rows):
        measured = float(np.mean([each["requests_per_s"] for each in same(rows, row, row["side"])]))
        said = planned.requests_per_s(row)
        found.append(
            {key: row[key] for key in ("side", "px", "output")}
            | {"requests_per_s": measured, "planned": said, "error": said / measured - 1}
        )
        print(
            f"{row['px']:5} px, {row['output']:3} tokens, {row['side']:31} {measured:7.3f} "
            f"requests/s; planned {said:7.3f} ({said / measured - 1:+.0%})"
        )
    return found


def _cases(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of each server, size and length, under the load that is more than it can do."""
    return [row for row in rows if row["round"] == 0 and row["load"] == "sent"]


def _is_compared(kind: str, side: str) -> bool:
    """Decoupled servers are compared with all, coupled ones with what they can be."""
    if side == _BASES[kind] or side == "transformers":
        return False
    if kind == "vision core added":
        return side.startswith("DvD")
    return kind == "plain transformers" or side not in _BASES.values()


def _ratio(
    kind: str,
    rows: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    planned: Planned,
    row: dict[str, Any],
) -> dict[str, Any]:
    mine = same(rows, row, row["side"])
    each = [a["requests_per_s"] / b["requests_per_s"] for a, b in zip(mine, theirs, strict=True)]
    return {
        "kind": kind,
        "side": row["side"],
        "px": row["px"],
        "output": row["output"],
        "rounds": len(each),
        "ratio": np.quantile(each, (0.25, 0.5, 0.75)).tolist(),
        "planned": planned.ratio(row, theirs[0]),
        "bound": bound(planned.config, planned.pictures.px(row["px"]), row),
        "table_18": None if kind == "plain transformers" else reported(row["side"], row["px"]),
    }


def _told(ratio: dict[str, Any]) -> str:
    low, middle, high = ratio["ratio"]
    paper = "" if ratio["table_18"] is None else f", table 18 {ratio['table_18']:.2f}x"
    return (
        f"{ratio['kind']}, {ratio['px']} px, {ratio['output']} tokens: {ratio['side']} "
        f"{middle:.2f}x (quartiles {low:.2f}-{high:.2f}, {ratio['rounds']} rounds); planned "
        f"{ratio['planned']:.2f}x, operations saved {ratio['bound']:.2f}x{paper}"
    )


def reported(side: str, resolution: int) -> float | None:
    """The ratio of table 18, for the 38B."""
    setting = {"DvD": "DvD", "DvD + router, half": "DvD + ViR"}.get(side)
    values = {
        row.setting: row.requests_per_s
        for row in TABLE_18
        if (row.model, row.resolution_px) == ("InternVL3.5-38B", resolution)
    }
    return None if setting is None else values[setting] / values["Baseline"]
