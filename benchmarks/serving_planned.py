"""What arithmetic and the planner say to the rows of bench_serving.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch

from cascadevl.data.tiling import TilingConfig, num_tiles_of
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.planning.counts import Counts, count
from cascadevl.planning.hardware import Hardware, measured_core
from cascadevl.planning.service import ModelService, Question, Step
from cascadevl.planning.simulation import Layout, Load, simulate

_TEXT_TOKENS = 64


class Pictures(Protocol):
    """Knows how large the pictures are that stand for a resolution; see `bench_serving.Bench`."""

    number: int

    def px(self, resolution: int) -> int:
        """Their side."""
        ...


def measured_here(core: int, *, tiny: bool) -> Hardware:
    """What one core does at most: a large product, and reading a large matrix.

    Args:
        core: On which it is measured.
        tiny: With small sizes, only to see that it works.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    side = 512 if tiny else 4096
    matrix = torch.randn(side, side).to(torch.bfloat16)
    square, row = matrix[: side // 2, : side // 2].contiguous(), matrix[:1].clone()
    product = min(_time(lambda: square @ square) for _ in range(7))
    read = min(_time(lambda: torch.nn.functional.linear(row, matrix)) for _ in range(7))
    os.sched_setaffinity(0, before)
    return measured_core(2 * (side // 2) ** 3 / product, matrix.nbytes / read, 8e9)


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def question_of(
    config: CascadeVLConfig, px: int, new_tokens: int, compressed_share: float | None = None
) -> Question:
    """What a row asks, as the planner knows it."""
    tiling = TilingConfig(tile_px=config.tile_px, max_tiles=config.max_tiles)
    return Question(
        tiles=num_tiles_of(px, px, tiling),
        text_tokens=_TEXT_TOKENS,
        new_tokens=new_tokens,
        compressed_share=compressed_share,
    )


def same(rows: list[dict[str, Any]], row: dict[str, Any], side: str) -> list[dict[str, Any]]:
    """What a server did under the load of a row, in all rounds."""
    keys = ("px", "output", "load")
    return [each for each in rows if each["side"] == side and all(each[k] == row[k] for k in keys)]


def share_of(row: dict[str, Any]) -> float | None:
    """Share of tiles that a row's router compressed; None without a router."""
    return float(row["compressed_share"]) if "router" in str(row["side"]) else None


def bound(config: CascadeVLConfig, px: int, row: dict[str, Any]) -> float:
    """By how much fewer operations raise the requests a second, where they alone count.

    That decoding reads memory, and that halves wait for each other, is left out.

    Args:
        config: The shape.
        px: Side of the pictures.
        row: What was measured.
    """
    counts, new_tokens = count(config), int(row["output"])

    def flops(share: float | None) -> float:
        question = question_of(config, px, new_tokens, share)
        tokens = question.ask(counts).prompt_tokens + new_tokens - 1
        tile = counts.tile_flops
        if share is not None:
            saved = counts.tile_flops - counts.compressed_tile_flops
            tile += counts.router_flops - share * saved
        language = tokens * counts.token_flops + tokens * (tokens + 1) / 2 * counts.pair_flops
        return question.tiles * tile + language + new_tokens * counts.head_flops

    return flops(None) / flops(share_of(row))


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The planner, with three figures that were found here.

    Attributes:
        counts: Of the model.
        config: The same as a shape.
        core: What one does at most.
        pictures: How large they are, and how many are sent.
        share: Of the core's operations a second that is reached.
        memory: Of its bytes a second.
        gain: How many cores two threads that compute one product together are worth; they read
            no faster than one.
    """

    counts: Counts
    config: CascadeVLConfig
    core: Hardware
    pictures: Pictures
    share: float = 0.5
    memory: float = 1.0
    gain: float = 1.5

    @classmethod
    def fitted(
        cls,
        config: CascadeVLConfig,
        core: Hardware,
        rows: list[dict[str, Any]],
        pictures: Pictures,
    ) -> Planned:
        """Find the figures on coupled rows at the lowest resolution: one each.

        The operations on one core with the shortest answers, the bytes there with the longest (if
        there are several lengths), two threads with the shortest. Each row depends on its figure
        most, so they are found in turn.

        Args:
            config: The shape.
            core: What one core does at most.
            rows: Measured.
            pictures: How large they are, and how many are sent.
        """
        sent = sorted(
            (row for row in rows if row["load"] == "sent"),
            key=lambda row: (row["px"], row["output"]),
        )
        low = [row for row in sent if row["px"] == sent[0]["px"]]
        single = [row for row in low if row["side"] == "coupled, one core"]
        both = [row for row in low if row["side"] == "coupled"]
        found = cls(counts=count(config), config=config, core=core, pictures=pictures)
        for _ in range(5):
            found = found._with("share", single[0], rows, 1.0)
            if single[-1]["output"] > single[0]["output"]:
                found = found._with("memory", single[-1], rows, 1.0)
            if both[0]["threads"] == 2:
                found = found._with("gain", both[0], rows, 2.0)
        return found

    def _with(
        self, name: str, row: dict[str, Any], rows: list[dict[str, Any]], most: float
    ) -> Self:
        """The figure of a name set so that the planner is right about a row's mean."""
        each = [found["requests_per_s"] for found in same(rows, row, row["side"])]
        measured, low, high = sum(each) / len(each), 0.0, most
        for _ in range(14):
            middle = (low + high) / 2
            said = replace(self, **{name: middle}).requests_per_s(row)
            low, high = (low, middle) if said > measured else (middle, high)
        return replace(self, **{name: high})

    def requests_per_s(self, row: dict[str, Any]) -> float:
        """What the planner says to a row."""
        side = str(row["side"])
        if side == "transformers":
            return self._alone(row)
        # Two halves with a thread each work side by side, as two servers do; with two threads
        # each they take turns on both cores.
        on_both = side.startswith("coupled") and side != "coupled, one core"
        is_apart = side.startswith("DvD") or (on_both and row["threads"] == 1)
        question = self._question(row)
        service = self._service(question, threads=2 if on_both and not is_apart else 1)
        load = Load(rate=float(row["rate"]), num_requests=self.pictures.number, seed=None)
        layout = Layout(vision=1 if is_apart else 0)
        return simulate(service, question.ask(self.counts), layout, load).requests_per_s

    def ratio(self, row: dict[str, Any], base: dict[str, Any]) -> float:
        """What the planner says to the ratio of two rows."""
        return self.requests_per_s(row) / self.requests_per_s(base)

    def _question(self, row: dict[str, Any]) -> Question:
        px, new_tokens = self.pictures.px(int(row["px"])), int(row["output"])
        return question_of(self.config, px, new_tokens, share_of(row))

    def _service(self, question: Question, *, threads: int) -> ModelService:
        flops = self.core.flops_per_s * (self.gain if threads == 2 else 1.0)
        return ModelService(
            counts=self.counts,
            question=question,
            hardware=replace(self.core, flops_per_s=flops),
            compute_share=self.share,
            memory_share=self.memory,
            link_bytes_per_s=1e9,
        )

    def _alone(self, row: dict[str, Any]) -> float:
        """One request after the other on both cores: its tiles, its prompt, token after token."""
        question = self._question(row)
        service = self._service(question, threads=2)
        ask = question.ask(self.counts)
        pairs = ask.prompt_tokens * (ask.prompt_tokens + 1) // 2
        seconds = service.encode_s(ask.tiles) + service.step_s(
            Step(ask.prompt_tokens, pairs, 1, 0, 0)
        )
        for said in range(1, ask.new_tokens):
            seconds += service.step_s(Step(0, 0, 0, 1, ask.prompt_tokens + said))
        return min(float(row["rate"]), 1.0 / seconds)
