"""Carries out the plan of a step with the model's own text body.

The tokens of a step stand in one row, those that decode first, then the chunks of prompts; linear
layers see them all at once. Attention finds its way by `PagedAttention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor
from torch.nn import functional as F

from cascadevl.engine.attention_plan import AttentionPlan, Span, attention_plan
from cascadevl.engine.jobs import Chunk, Job, Plan
from cascadevl.engine.paged_attention import KeyValueStore, PagedAttention
from cascadevl.engine.sharing import Group, shared_beginnings
from cascadevl.engine.vision import Visual
from cascadevl.errors import ConfigError
from cascadevl.model.attention import TEXT_ATTENTION
from cascadevl.model.configuration import attention_windows
from cascadevl.model.modeling import CascadeVLForConditionalGeneration

_FIXED_DECODES = 16
"""Tokens decoded at once where each is to be computed with the same operations always."""


_WORTH_SHARING = 4096
"""Tokens whose keys need not be read again, from which on attending to them apart pays: a common
system prompt alone is read faster by each answer for itself."""


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """The row of tokens of a forward pass."""

    ids: Int64[np.ndarray, " tokens"]
    positions: Float32[np.ndarray, " tokens"]
    slots: Int64[np.ndarray, " tokens"]
    spans: list[Span]
    visual_index: Int64[np.ndarray, " visual"]
    visual: list[Float[Tensor, "_ hidden"]]


class Runner:
    """One model and the store of its keys and values."""

    def __init__(
        self,
        model: CascadeVLForConditionalGeneration,
        num_pages: int,
        page_tokens: int,
        *,
        fixed_chunk: int | None = None,
    ) -> None:
        """Reserve the store.

        Args:
            model: Computes.
            num_pages: Pages there are.
            page_tokens: Tokens a page holds.
            fixed_chunk: Compute every job apart, with matrices of fixed sizes: chunks are filled
                up to so many tokens.
        """
        self.model, self.page_tokens, self.fixed_chunk = model, page_tokens, fixed_chunk
        text = model.config.text_config
        self.num_heads = int(text.num_attention_heads)
        self.windows = attention_windows(text)
        # Which tokens an expert sees together depends on all of them: they are computed singly.
        has_experts = any(
            getattr(text, name, None) for name in ("num_experts", "num_local_experts")
        )
        self.fixed_decodes = 1 if has_experts else _FIXED_DECODES
        num_kv, head_dim = kv_shape(model)
        self.store = KeyValueStore(
            int(text.num_hidden_layers),
            num_kv,
            head_dim,
            num_pages,
            page_tokens,
            dtype=model.dtype,
            device=model.device,
        )
        self._groups: tuple[object, tuple[Group, ...]] = (None, ())

    @torch.inference_mode()
    def run(
        self,
        plan: Plan,
        table: Int[np.ndarray, "lanes pages"],
        visual: Visual,
        changes: int,
    ) -> Float[Tensor, "sampled vocab"]:
        """Compute the step; logits of what follows each of ``plan.rows``.

        Args:
            plan: The step.
            table: Pages of all lanes.
            visual: Gives visual tokens.
            changes: Changes whenever another set of jobs runs or shares pages.

        Raises:
            ConfigError: If the text body was given an attention that knows no pages.
        """
        check_attention(self.model)
        self.store.copy(plan.copies)
        if self.fixed_chunk is not None:
            hidden = self._run_apart(plan, table, visual)
        else:
            hidden = self._run_together(plan, table, visual, changes)
        if not plan.rows:
            return hidden.new_empty(0, self.model.config.text_config.vocab_size)
        return self._logits(hidden, plan.rows)

    def _logits(
        self, hidden: Float[Tensor, "tokens hidden"], rows: Sequence[int]
    ) -> Float[Tensor, "sampled vocab"]:
        """Logits of rows; a row that several samples continue is computed once."""
        unique, inverse = np.unique(np.asarray(rows), return_inverse=True)
        device = hidden.device
        chosen = hidden if len(unique) == len(hidden) else hidden[_on(device, unique)]
        if self.fixed_chunk is None:
            logits: Tensor = self.model.lm_head(chosen)
        else:
            parts = [
                self.model.lm_head(_filled(part, self.fixed_decodes))[: len(part)]
                for part in chosen.split(self.fixed_decodes)
            ]
            logits = torch.cat(parts)
        same = len(unique) == len(rows) and (inverse == np.arange(len(rows))).all()
        return logits if same else logits[_on(device, inverse)]

    def _run_together(
        self, plan: Plan, table: Int[np.ndarray, "lanes pages"], visual: Visual, changes: int
    ) -> Float[Tensor, "tokens hidden"]:
        inputs = self._inputs(plan.decodes, plan.chunks, table, visual)
        jobs = [*plan.decodes, *(chunk.job for chunk in plan.chunks)]
        groups = self._groups_of(jobs, inputs.spans, table, changes)
        plans = {
            window: attention_plan(
                inputs.spans,
                groups,
                self.page_tokens,
                self.num_heads,
                window=window,
                apart_from=self.store.apart_from,
            )
            for window in self.windows
        }
        return self._forward(inputs, plans)

    def _groups_of(
        self,
        jobs: Sequence[Job],
        spans: Sequence[Span],
        table: Int[np.ndarray, "lanes pages"],
        changes: int,
    ) -> tuple[Group, ...]:
        """Who shares pages: worked out anew only when other jobs run, or prompts are read."""
        only_decodes = all(span.stop - span.start == 1 for span in spans)
        label = (changes, len(jobs)) if only_decodes else None
        if label is None or self._groups[0] != label:
            lanes = [job.lane for job in jobs]
            usable = [span.start // self.page_tokens for span in spans]
            width = max(usable, default=0)
            least = _WORTH_SHARING // self.page_tokens
            self._groups = (label, shared_beginnings(table[lanes, :width], usable, least=least))
        return self._groups[1]

    def _run_apart(
        self, plan: Plan, table: Int[np.ndarray, "lanes pages"], visual: Visual
    ) -> Float[Tensor, "tokens hidden"]:
        """The same in passes of fixed sizes, in which jobs do not meet but in linear layers."""
        assert self.fixed_chunk is not None
        hidden: list[Tensor] = []
        passes: Iterator[tuple[Sequence[Job], Sequence[Chunk], int]] = (
            (plan.decodes[start : start + self.fixed_decodes], (), self.fixed_decodes)
            for start in range(0, len(plan.decodes), self.fixed_decodes)
        )
        for decodes, chunks, size in (
            *passes,
            *(((), (chunk,), self.fixed_chunk) for chunk in plan.chunks),
        ):
            inputs = self._inputs(decodes, chunks, table, visual)
            plans = {
                window: attention_plan(
                    inputs.spans, (), self.page_tokens, self.num_heads, window=window, alone=True
                )
                for window in self.windows
            }
            hidden.append(self._forward(inputs, plans, size=size))
        return torch.cat(hidden)

    def _inputs(
        self,
        decodes: Sequence[Job],
        chunks: Sequence[Chunk],
        table: Int[np.ndarray, "lanes pages"],
        visual: Visual,
    ) -> _Inputs:
        """Lay the tokens side by side."""
        said = np.array([job.computed - len(job.prompt.ids) for job in decodes], dtype=np.int64)
        ends = [job.prompt.positions[-1] for job in decodes]
        ids = [np.array([job.generated[n] for job, n in zip(decodes, said, strict=True)], np.int64)]
        positions = [np.array(ends, dtype=np.float32) + (said + 1).astype(np.float32)]
        lanes = np.array([job.lane for job in decodes], dtype=np.int64)
        places = np.array([job.computed for job in decodes], dtype=np.int64)
        slots = [table[lanes, places // self.page_tokens] * self.page_tokens]
        slots[0] += places % self.page_tokens
        spans = [
            Span(row, place, place + 1, table[lane])
            for row, (lane, place) in enumerate(zip(lanes, places.tolist(), strict=True))
        ]
        row, features, visual_index = len(decodes), [], [np.empty(0, dtype=np.int64)]
        for chunk in chunks:
            tokens = chunk.job.prompt
            if chunk.stop > len(tokens):
                tokens = tokens.followed_by(chunk.job.generated)
            part = np.arange(chunk.start, chunk.stop)
            pages = table[chunk.job.lane]
            ids.append(tokens.ids[chunk.start : chunk.stop])
            positions.append(tokens.positions[chunk.start : chunk.stop])
            slots.append(pages[part // self.page_tokens] * self.page_tokens)
            slots[-1] += part % self.page_tokens
            spans.append(Span(row, chunk.start, chunk.stop, pages))
            found = visual(chunk)
            if found is not None:
                features.append(found)
                visual_index.append(row + _visual_places(chunk))
            row += chunk.stop - chunk.start
        return _Inputs(
            np.concatenate(ids),
            np.concatenate(positions),
            np.concatenate(slots),
            spans,
            np.concatenate(visual_index),
            features,
        )

    def _forward(
        self, inputs: _Inputs, plans: dict[int | None, AttentionPlan], *, size: int = 0
    ) -> Float[Tensor, "tokens hidden"]:
        """Hidden states of a row, filled up to a size while they are computed."""
        body, device = self.model.model, self.model.device
        embeds = body.embed(
            _on(device, inputs.ids)[None],
            _on(device, inputs.visual_index),
            torch.cat(inputs.visual)[None] if inputs.visual else None,
        )
        positions = _on(device, inputs.positions)
        number = len(inputs.ids)
        if size > number:
            embeds = _filled(embeds[0], size)[None]
            positions = _filled(positions, size)
        attend = PagedAttention(self.store, _on(device, inputs.slots), plans)
        return body.run_attending(embeds, positions[None], attend)[0, :number]


def check_attention(model: CascadeVLForConditionalGeneration) -> None:
    """Refuse a text body whose attention would see the new tokens only, and not say so.

    Raises:
        ConfigError: If it is not our own.
    """
    found = model.model.language_model.config._attn_implementation
    if found != TEXT_ATTENTION:
        raise ConfigError(
            f"the text body computes attention by {found!r}, which knows no pages; set it back "
            f"with model.model.language_model.set_attn_implementation({TEXT_ATTENTION!r}), and "
            f"give other models a copy of the configuration"
        )


def kv_shape(model: CascadeVLForConditionalGeneration) -> tuple[int, int]:
    """Key heads of the text body and their width."""
    text = model.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_key_value_heads or text.num_attention_heads), int(head_dim)


def page_bytes(model: CascadeVLForConditionalGeneration, page_tokens: int) -> int:
    """Memory of one page in all layers."""
    num_kv, head_dim = kv_shape(model)
    layers = int(model.config.text_config.num_hidden_layers)
    return 2 * layers * num_kv * head_dim * page_tokens * model.dtype.itemsize


def _visual_places(chunk: Chunk) -> Int64[np.ndarray, " visual"]:
    """Which tokens of a chunk are visual, counted from its first."""
    spans = chunk.job.prompt.pictures
    return np.concatenate(
        [
            np.arange(max(start, chunk.start), min(stop, chunk.stop)) - chunk.start
            for start, stop, _ in spans
        ]
    )


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(device)


def _filled(rows: Float[Tensor, "rows ..."], size: int) -> Float[Tensor, "size ..."]:
    """Rows of zeros behind, up to a number of rows."""
    missing = (0, 0) * (rows.dim() - 1) + (0, size - len(rows))
    return F.pad(rows, missing)
