"""What arithmetic and the planner say to the rows of bench_serving.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from cascadevl.data.tiling import TilingConfig, num_tiles_of
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.planning.counts import Counts, count
from cascadevl.planning.hardware import Hardware, measured_core
from cascadevl.planning.plan import Site
from cascadevl.planning.service import Question, Step
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
    """The planner, with the share of a core's operations that was found here.

    Attributes:
        counts: Of the model.
        config: The same as a shape.
        core: What one does at most.
        share: Of the core's operations a second that is reached.
        pictures: How large they are.
    """

    counts: Counts
    config: CascadeVLConfig
    core: Hardware
    share: float
    pictures: Pictures

    @classmethod
    def fitted(
        cls,
        config: CascadeVLConfig,
        core: Hardware,
        rows: list[dict[str, Any]],
        pictures: Pictures,
    ) -> Planned:
        """Find the share on the first coupled row; nothing else is fitted.

        Args:
            config: The shape.
            core: What one core does at most.
            rows: Measured.
            pictures: How large they are.
        """
        base = next(row for row in rows if (row["side"], row["load"]) == ("coupled", "sent"))
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            said = cls(
                counts=count(config),
                config=config,
                core=core,
                share=middle,
                pictures=pictures,
            )
            is_high = said.requests_per_s(base) > base["requests_per_s"]
            low, high = (low, middle) if is_high else (middle, high)
        return replace(said, share=(low + high) / 2)

    def requests_per_s(self, row: dict[str, Any]) -> float:
        """What the planner says to a row; infinite for a server that it does not know."""
        side = str(row["side"])
        if side == "transformers":
            return self._alone(row)
        question = self._question(row)
        # Two halves with a thread each work side by side, as two servers do; with two threads
        # each they take turns on both cores.
        on_both = side.startswith("coupled") and side != "coupled, one core"
        is_apart = side.startswith("DvD") or (on_both and row["threads"] == 1)
        group = 2 if on_both and row["threads"] == 2 else 1
        service = self._site(group).service(self.counts, question, coupled=not is_apart)
        load = Load(rate=float(row["rate"]), num_requests=self.pictures.number, seed=None)
        layout = Layout(vision=1 if is_apart else 0)
        return simulate(service, question.ask(self.counts), layout, load).requests_per_s

    def ratio(self, row: dict[str, Any], base: dict[str, Any]) -> float:
        """What the planner says to the ratio of two rows."""
        return self.requests_per_s(row) / self.requests_per_s(base)

    def _question(self, row: dict[str, Any]) -> Question:
        px, new_tokens = self.pictures.px(int(row["px"])), int(row["output"])
        return question_of(self.config, px, new_tokens, share_of(row))

    def _site(self, group: int) -> Site:
        return Site(
            hardware=self.core,
            processors=2,
            group=group,
            compute_share=self.share,
            memory_share=1.0,
            link_bytes_per_s=1e9,
        )

    def _alone(self, row: dict[str, Any]) -> float:
        """One request after the other on both cores: its tiles, its prompt, token after token."""
        question = self._question(row)
        service = self._site(2).service(self.counts, question, coupled=True)
        ask = question.ask(self.counts)
        pairs = ask.prompt_tokens * (ask.prompt_tokens + 1) // 2
        seconds = service.encode_s(ask.tiles) + service.step_s(
            Step(ask.prompt_tokens, pairs, 1, 0, 0)
        )
        for said in range(1, ask.new_tokens):
            seconds += service.step_s(Step(0, 0, 0, 1, ask.prompt_tokens + said))
        return min(float(row["rate"]), 1.0 / seconds)
