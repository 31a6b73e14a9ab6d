"""InternVL3.5's measurements of DvD (table 18), and what the planner says to the same questions.

Two figures a model are fitted, on the rows of 448 px without and with DvD: the share of the
hardware's operations a second that is reached (the same for both halves), and how many requests
were sent. The second matters because DvD at 448 px answers faster than was sent: there the time
until the last answers are given sets the figure. All other rows are predicted. Two rows are left
out: they report more requests a second than are said to have been sent.

What the report does not say is assumed, and held for all rows: see `ASSUMED` and
docs/concepts/planner.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from cascadevl.data.tiling import TilingConfig, num_tiles_of
from cascadevl.model.zoo import config_for
from cascadevl.planning.counts import Counts, count
from cascadevl.planning.hardware import HARDWARE
from cascadevl.planning.plan import Site
from cascadevl.planning.service import Question
from cascadevl.planning.simulation import Layout, Load, simulate

Setting: TypeAlias = Literal["Baseline", "DvD", "DvD + ViR"]

SENT_PER_S = 16.0
"""Requests a second that were sent, as the report says."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table, for one of its models.

    Attributes:
        model: Name of the released size.
        resolution_px: Side of the pictures.
        setting: How it was served.
        requests_per_s: What was measured.
    """

    model: str
    resolution_px: int
    setting: Setting
    requests_per_s: float

    @property
    def use(self) -> Literal["fitted", "predicted", "excluded"]:
        """What the planner does with it."""
        if self.requests_per_s > SENT_PER_S:
            return "excluded"
        is_base = self.resolution_px == 448 and self.setting in ("Baseline", "DvD")
        return "fitted" if is_base else "predicted"


_DENSE, _EXPERTS = "InternVL3.5-38B", "InternVL3.5-241B-A28B"

_MEASURED: tuple[tuple[int, Setting, tuple[float, float]], ...] = (
    (448, "Baseline", (12.39, 11.29)),
    (448, "DvD", (14.69, 14.05)),
    (448, "DvD + ViR", (18.62, 20.84)),
    (896, "Baseline", (2.71, 2.54)),
    (896, "DvD", (5.06, 4.73)),
    (896, "DvD + ViR", (10.97, 8.81)),
    (1344, "Baseline", (1.48, 1.37)),
    (1344, "DvD", (2.92, 2.75)),
    (1344, "DvD + ViR", (5.14, 4.27)),
)

TABLE_18 = tuple(
    Row(model, px, setting, value)
    for px, setting, values in _MEASURED
    for model, value in zip((_DENSE, _EXPERTS), values, strict=True)
)
"""Requests a second with the language model on eight A100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What the report does not say.

    Attributes:
        text_tokens: Of the questions, template included.
        new_tokens: Of the answers.
        compressed_share: Of the tiles, with the router: two thirds leave half of the tokens, which
            the report gives as an average.
        vision_gpus: Of the vision server: as many as are never waited for.
    """

    text_tokens: int = 64
    new_tokens: int = 32
    compressed_share: float = 2 / 3
    vision_gpus: int = 32


ASSUMED = Assumed()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What is fitted to a model's rows.

    Attributes:
        compute_share: Share of the hardware's operations a second that is reached.
        num_requests: That were sent.
    """

    compute_share: float
    num_requests: int


FITTED: dict[str, Fit] = {
    _DENSE: Fit(compute_share=0.1696, num_requests=66),
    _EXPERTS: Fit(compute_share=0.1352, num_requests=88),
}
"""What `fit` finds for the models of the table; a test finds it again."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A row beside what the planner says.

    Attributes:
        row: The row.
        requests_per_s: What the planner says.
    """

    row: Row
    requests_per_s: float

    @property
    def error(self) -> float:
        """By how much of the measured figure it is too high."""
        return self.requests_per_s / self.row.requests_per_s - 1.0


def predict(row: Row, found: Fit, counts: Counts, assumed: Assumed = ASSUMED) -> Prediction:
    """What the planner says to the questions of a row.

    Args:
        row: The row.
        found: Of its model.
        counts: Of its model.
        assumed: What the report does not say.
    """
    tiles = num_tiles_of(row.resolution_px, row.resolution_px, TilingConfig())
    routed = row.setting == "DvD + ViR"
    question = Question(
        tiles=tiles,
        text_tokens=assumed.text_tokens,
        new_tokens=assumed.new_tokens,
        compressed_share=assumed.compressed_share if routed else None,
    )
    coupled = row.setting == "Baseline"
    layout = Layout(vision=0 if coupled else assumed.vision_gpus)
    site = Site(hardware=HARDWARE["a100"], processors=8, group=8, compute_share=found.compute_share)
    load = Load(rate=SENT_PER_S, num_requests=found.num_requests, seed=None)
    service = site.service(counts, question, coupled=coupled)
    return Prediction(row, simulate(service, question.ask(counts), layout, load).requests_per_s)


def predictions(model: str, assumed: Assumed = ASSUMED) -> list[Prediction]:
    """All rows of a model beside what the planner says, those that are left out included.

    Args:
        model: Name of the released size.
        assumed: What the report does not say.
    """
    counts = count(config_for(model))
    rows = [row for row in TABLE_18 if row.model == model]
    return [predict(row, FITTED[model], counts, assumed) for row in rows]


def fit(
    model: str, assumed: Assumed = ASSUMED, *, start: Fit | None = None, rounds: int = 4
) -> Fit:
    """Find the two figures from the two rows of 448 px.

    Each row depends on one of them far more than on the other, so they are found in turn.

    Args:
        model: Name of the released size.
        assumed: What the report does not say.
        start: Where to begin.
        rounds: How often both are found.
    """
    counts = count(config_for(model))
    base, decoupled = (row for row in TABLE_18 if row.model == model and row.use == "fitted")
    found = start or Fit(compute_share=0.2, num_requests=300)
    for _ in range(rounds):
        found = _fitted_share(base, found, counts, assumed)
        found = _fitted_number(decoupled, found, counts, assumed)
    return found


def _fitted_share(row: Row, found: Fit, counts: Counts, assumed: Assumed) -> Fit:
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        share = (low + high) / 2
        said = predict(row, replace(found, compute_share=share), counts, assumed)
        low, high = (low, share) if said.error > 0 else (share, high)
    return replace(found, compute_share=round((low + high) / 2, 4))


def _fitted_number(row: Row, found: Fit, counts: Counts, assumed: Assumed) -> Fit:
    low, high = 10, 5000
    while high - low > 1:
        number = (low + high) // 2
        said = predict(row, replace(found, num_requests=number), counts, assumed)
        low, high = (low, number) if said.error > 0 else (number, high)
    return replace(found, num_requests=high)


def share_for(counts: Counts) -> float:
    """The share of its operations a second that a GPU is taken to reach with a model.

    Args:
        counts: Of the model; experts are computed less well than dense layers.
    """
    model = _DENSE if counts.expert_share == 1 else _EXPERTS
    return FITTED[model].compute_share
