"""What bench_serving.py found, as tables of Markdown for RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def tables(document: dict[str, Any]) -> str:
    """All tables.

    Args:
        document: What the program writes.
    """
    outputs = sorted({row["output"] for row in document["rows"]})
    parts = [_rates(document["rows"], outputs)]
    parts += [_ratios(document, output) for output in outputs]
    return "\n\n".join(parts)


def _rates(rows: Sequence[dict[str, Any]], outputs: Sequence[int]) -> str:
    """Requests a second of every server in every round."""
    columns = [(px, output) for output in outputs for px in sorted({row["px"] for row in rows})]
    lines = []
    for side in dict.fromkeys(row["side"] for row in rows):
        cells = []
        for px, output in columns:
            found = [row for row in _sent(rows, output) if (row["side"], row["px"]) == (side, px)]
            cells.append(", ".join(f"{row['requests_per_s']:.2f}" for row in found))
        lines.append([side, *cells])
    head = ["requests/s, all rounds", *(f"{px} px, {output} tokens" for px, output in columns)]
    return _table(head, lines)


def _ratios(document: dict[str, Any], output: int) -> str:
    """Medians against each server that others are compared with."""
    ratios = [each for each in document["ratios"] if each["output"] == output]
    kinds = list(dict.fromkeys(each["kind"] for each in ratios))
    errors = {
        (each["side"], each["px"]): each["error"]
        for each in document["errors"]
        if each["output"] == output
    }
    lines = []
    for px, side in dict.fromkeys((each["px"], each["side"]) for each in ratios):
        mine = {each["kind"]: each for each in ratios if (each["px"], each["side"]) == (px, side)}
        cells = []
        for kind in kinds:
            found = mine.get(kind)
            cells += ["", ""] if found is None else [_x(found["ratio"][1]), _x(found["planned"])]
        saved = _x(next(iter(mine.values()))["bound"])
        papers = [each["table_18"] for each in mine.values() if each["table_18"] is not None]
        paper = _x(papers[0]) if papers else ""
        lines.append([f"{px} px, {side}", *cells, saved, f"{errors[side, px]:+.0%}", paper])
    head = [f"{output} tokens", *(name for kind in kinds for name in (kind, "planned"))]
    return _table([*head, "saved", "planner's error in requests/s", "table 18"], lines)


def _sent(rows: Sequence[dict[str, Any]], output: int) -> Iterator[dict[str, Any]]:
    return (row for row in rows if row["output"] == output and row["load"] == "sent")


def _x(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
