"""What requests ask of sampling: checked where it enters, and kept as columns of numbers.

A step samples for many requests of different wishes at once. So wishes are not objects then, but
rows of a table, which `cascadevl.engine.sampler.sample` takes as arrays.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from cascadevl.engine.draws import stream_of
from cascadevl.errors import RequestError

_SEEDS = 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when its answer ends.

    Attributes:
        temperature: 0 takes the most probable token; above, logits are divided by it.
        top_p: Draw from the most probable tokens that together reach this probability.
        top_k: Draw from this many most probable tokens; 0 for all.
        min_p: Draw from tokens at least this fraction as probable as the most probable one.
        repetition_penalty: Above 1, tokens of the prompt and the answer become less likely.
        seed: Of the request's random stream; the same seed gives the same draws, whatever else
            runs beside the request.
        max_tokens: Most tokens of the answer.
        min_tokens: Stop tokens are not drawn and stop strings not heeded before so many tokens.
        stop: The answer ends before the first of these strings.
        stop_token_ids: Tokens that end the answer, beside those of the model.
        ignore_eos: Go on past the model's own stop tokens, for measurements.
        logprobs: None for no log-probabilities, 0 for those of the chosen tokens, n for those of
            the n most probable tokens too.
        json_schema: Schema, as JSON text, that the answer is made to follow.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges, and that no two wishes exclude each other.

        Raises:
            RequestError: If a value means nothing; says which, and what may stand there.
        """
        self._check_drawing()
        self._check_ending()

    def _check_drawing(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise RequestError(
                f"temperature is {self.temperature}; it must be a number of 0 (greedy) or more"
            )
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p is {self.min_p}; it must be from 0 (off) to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise RequestError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0, 1 is off"
            )
        if not 0 <= self.seed < _SEEDS:
            raise RequestError(f"seed is {self.seed}; it must be from 0 to 2**64 - 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise RequestError(
                f"logprobs is {self.logprobs}; it must be 0 (chosen tokens only) or more, or absent"
            )

    def _check_ending(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; it must be from 0 to max_tokens, which is "
                f"{self.max_tokens}"
            )
        if "" in self.stop:
            raise RequestError(
                f"a stop string is empty, it would end every answer at once; leave it out of "
                f"{list(self.stop)}"
            )
        if min(self.stop_token_ids, default=0) < 0:
            raise RequestError(
                f"stop_token_ids holds {min(self.stop_token_ids)}; ids of tokens are 0 or more"
            )
        others = ("min_tokens", "ignore_eos", "stop", "stop_token_ids")
        clash = [name for name in others if getattr(self, name)]
        if self.json_schema is not None and clash:
            raise RequestError(
                f"json_schema is given together with {', '.join(clash)}, but an answer in JSON "
                f"ends where its JSON does; leave {'them' if len(clash) > 1 else 'it'} out"
            )


_COLUMNS = np.dtype(
    [
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("top_k", np.int64),
        ("min_p", np.float64),
        ("penalty", np.float64),
        ("min_tokens", np.int64),
        ("logprobs", np.int64),  # -1 for none
        ("stream", np.uint64),
    ]
)
_FIRST_ROWS = 16


class SamplingTable:
    """What the running samples wish, one row each; rows are added and removed at little cost.

    Attributes:
        vocab_size: Width of the logits.
        device: Where the logits are.
        columns: The numbers of every row, by name; free rows hold anything.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        """Begin empty."""
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.columns = np.zeros(_FIRST_ROWS, dtype=_COLUMNS)
        self._free = list(range(_FIRST_ROWS))
        self._names: dict[int, str] = {}
        self._ends: dict[int, Int64[np.ndarray, " ends"]] = {}
        self._seen: dict[int, Bool[Tensor, " vocab"]] = {}  # of rows with a penalty

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._names)

    def add(
        self,
        name: str,
        params: SamplingParams,
        *,
        number: int = 0,
        token_ids: Int64[np.ndarray, " tokens"] | Sequence[int] = (),
        end_ids: Sequence[int] = (),
    ) -> int:
        """Give a sample a row.

        Args:
            name: Names the sample in errors.
            params: The wishes of its request.
            number: Number of the sample among those of its request; names its random stream.
            token_ids: Prompt and, of a sample that is taken up again, what it has said.
            end_ids: Tokens that may not come before ``min_tokens``.

        Returns:
            The row; it stays the sample's until `remove`.

        Raises:
            RequestError: If a token is not in the vocabulary.
        """
        ids, ends = (np.asarray(each, dtype=np.int64) for each in (token_ids, end_ids))
        named = np.concatenate([ids, ends])
        wrong = named[(named < 0) | (named >= self.vocab_size)]
        if len(wrong):
            raise RequestError(
                f"{name} names the token {wrong[0]}, but tokens go from 0 to "
                f"{self.vocab_size - 1}; was it tokenised for another model?"
            )
        if not self._free:
            self._free = list(range(len(self.columns), 2 * len(self.columns)))
            self.columns = np.resize(self.columns, 2 * len(self.columns))
        row = heapq.heappop(self._free)
        self.columns[row] = (
            *(params.temperature, params.top_p, params.top_k, params.min_p),
            *(params.repetition_penalty, params.min_tokens),
            -1 if params.logprobs is None else params.logprobs,
            stream_of(params.seed, number),
        )
        self._names[row], self._ends[row] = name, ends
        if params.repetition_penalty != 1:
            seen = torch.zeros(self.vocab_size, dtype=torch.bool)
            seen[torch.from_numpy(ids)] = True
            self._seen[row] = seen.to(self.device)
        return row

    def remove(self, row: int) -> None:
        """Free the row of a sample that has ended or is interrupted."""
        del self._names[row], self._ends[row]
        self._seen.pop(row, None)
        heapq.heappush(self._free, row)

    def name(self, row: int) -> str:
        """The sample's name."""
        return self._names[row]

    def ends(self, row: int) -> Int64[np.ndarray, " ends"]:
        """Tokens that may not come before the sample's ``min_tokens``."""
        return self._ends[row]

    def seen(self, rows: Sequence[int]) -> Bool[Tensor, "rows vocab"]:
        """Tokens of prompt and answer, of rows with a repetition penalty."""
        return torch.stack([self._seen[row] for row in rows])

    def note(self, rows: Int64[np.ndarray, " rows"], tokens: Int64[np.ndarray, " rows"]) -> None:
        """Remember what was said, where a repetition penalty asks for it."""
        for place in np.flatnonzero(self.columns["penalty"][rows] != 1):
            self._seen[int(rows[place])][int(tokens[place])] = True
