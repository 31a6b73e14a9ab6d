"""Choosing the next token of many samples at once, each by the wishes of its own request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from cascadevl.engine import draws
from cascadevl.engine.sampling import SamplingTable
from cascadevl.errors import LogitsError
from cascadevl.losses.logprobs import token_logprobs

_CHUNK = 2**22  # scores worked on at once: larger outputs of torch are mapped anew at every call
_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True, eq=False)
class Allowed:
    """Which tokens grammars allow next.

    Attributes:
        places: The constrained ones among the rows of logits.
        tokens: What each of them may say.
    """

    places: Int64[np.ndarray, " constrained"]
    tokens: Bool[Tensor, "constrained vocab"]


@dataclass(frozen=True, slots=True, eq=False)
class TopLogprobs:
    """The most probable tokens, the most probable first; equals in no particular order."""

    token_ids: Int64[np.ndarray, " n"]
    logprobs: Float32[np.ndarray, " n"]


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What was chosen.

    Log-probabilities are those of the model itself: of its logits before grammar, penalty,
    temperature and filters. Training computes the same for the same tokens, so they are what
    policy optimisation (GSPO) can compare with.

    Attributes:
        tokens: The token of each row.
        logprobs: Its log-probability; NaN where the request asks for none.
        top: By row of logits, the most probable tokens for requests that ask for some.
    """

    tokens: Int64[np.ndarray, " rows"]
    logprobs: Float32[np.ndarray, " rows"]
    top: Mapping[int, TopLogprobs] = field(default_factory=dict)


def sample(
    logits: Float[Tensor, "rows vocab"],
    table: SamplingTable,
    rows: Int64[np.ndarray, " rows"],
    counters: Int64[np.ndarray, " rows"],
    allowed: Allowed | None = None,
) -> Sampled:
    """Choose the next token of every row; the table remembers it where a penalty asks for it.

    The order is that of transformers: grammar and ``min_tokens``, repetition penalty, temperature,
    top-k, top-p, min-p. A token depends on its row's logits, wishes, seed and counter and on no
    other row: bit for bit on a CPU, where this is tested.

    Args:
        logits: Of the next token.
        table: The wishes.
        rows: The row of the table for each row of logits.
        counters: How many tokens each answer has already.
        allowed: What grammars allow.

    Raises:
        LogitsError: If the largest logit of a row is not a finite number, or a row may say
            nothing. The table is as before, so the other rows can be asked again.
    """
    wishes = table.columns[rows]
    _refuse(logits.amax(-1), table, rows, counters, np.arange(len(rows)))
    early = counters < wishes["min_tokens"]
    restricted = early.copy()
    if allowed is not None:
        restricted[allowed.places] = True
    plain = (wishes["temperature"] == 0) & (wishes["penalty"] == 1) & ~restricted
    tokens = np.empty(len(rows), dtype=np.int64)
    if plain.any():
        (places,) = plain.nonzero()
        tokens[places] = _most_probable(_taken(logits, places)).numpy(force=True)
    for places in _chunks(~plain, logits.shape[1]):
        scores = draws.scores_of(_taken(logits, places))
        if allowed is not None:
            _allow(scores, places, allowed)
        for place in early[places].nonzero()[0]:
            ends = torch.from_numpy(table.ends(int(rows[places[place]])))
            scores[int(place), ends.to(scores.device)] = -math.inf
        _refuse(scores.amax(-1), table, rows, counters, places)
        _penalise(scores, wishes[places], table, rows[places])
        tokens[places] = _chosen(scores, wishes[places], counters[places]).numpy(force=True)
    logprobs, top = _logprobs(logits, tokens, wishes["logprobs"])
    table.note(rows, tokens)
    return Sampled(tokens, logprobs, top)


def _taken(
    values: Float[Tensor, "rows width"], places: Int64[np.ndarray, " some"]
) -> Float[Tensor, "some width"]:
    """The rows at ascending places; no copy if these are all."""
    if len(places) == len(values):
        return values
    return values[torch.from_numpy(places).to(values.device)]


def _chunks(
    wanted: Bool[np.ndarray, " rows"], vocab_size: int
) -> Iterator[Int64[np.ndarray, " some"]]:
    """The places of wanted rows, in groups that are worked on at once."""
    (places,) = wanted.nonzero()
    size = max(1, _CHUNK // vocab_size)
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _refuse(
    largest: Float[Tensor, " some"],
    table: SamplingTable,
    rows: Int64[np.ndarray, " rows"],
    counters: Int64[np.ndarray, " rows"],
    places: Int64[np.ndarray, " some"],
) -> None:
    """Raise an error if the largest score of a row is not a finite number."""
    values = largest.float().numpy(force=True)
    wrong = (~np.isfinite(values)).nonzero()[0]
    if not len(wrong):
        return
    first = places[wrong[0]]
    value = values[wrong[0]]
    reason = (
        "no token is allowed: all are masked; a grammar or min_tokens forbids every token"
        if value == -math.inf
        else f"the largest logit is {value}: weights or activations have overflowed; load the "
        f"model in bfloat16 or float32, and check its weights"
    )
    raise LogitsError(
        f"{table.name(int(rows[first]))}, token {counters[first]}: {reason}",
        places=tuple(places[wrong].tolist()),
    )


def _allow(
    scores: Float32[Tensor, "some width"], places: Int64[np.ndarray, " some"], allowed: Allowed
) -> None:
    """Put -inf where a grammar forbids."""
    _, inside, which = np.intersect1d(places, allowed.places, return_indices=True)
    if len(inside):
        index = torch.from_numpy(inside).to(scores.device)
        tokens = draws.widened(allowed.tokens[torch.from_numpy(which).to(scores.device)])
        scores[index] = scores[index].masked_fill(~tokens, -math.inf)


def _penalise(
    scores: Float32[Tensor, "some width"],
    wishes: np.ndarray,
    table: SamplingTable,
    rows: Int64[np.ndarray, " some"],
) -> None:
    """Make tokens that were seen less likely, where a request wishes it."""
    (some,) = (wishes["penalty"] != 1).nonzero()
    if len(some):
        index = torch.from_numpy(some).to(scores.device)
        penalty = torch.from_numpy(wishes["penalty"][some]).to(scores.device).float()
        seen = draws.widened(table.seen(rows[some].tolist()))
        scores[index] = draws.penalised(scores[index], seen, penalty)


def _chosen(
    scores: Float32[Tensor, "some width"],
    wishes: np.ndarray,
    counters: Int64[np.ndarray, " some"],
) -> Int64[Tensor, " some"]:
    """The most probable token of greedy rows, a drawn one of the others."""
    (drawn,) = (wishes["temperature"] > 0).nonzero()
    if not len(drawn):
        return _most_probable(scores)
    ours = {name: torch.from_numpy(wishes[name][drawn]) for name in _OF_DRAWING}
    on_device = {name: column.to(scores.device) for name, column in ours.items()}
    weights = draws.weights_of(_taken(scores, drawn), on_device.pop("temperature"))
    some = (ours["top_k"] > 0) | (ours["top_p"] < 1) | (ours["min_p"] > 0)
    if some.any():
        index = some.nonzero()[:, 0].to(scores.device)
        limits = {name: column[index] for name, column in on_device.items()}
        weights[index] = draws.filtered(weights[index], **limits)
    uniform = draws.uniforms(wishes["stream"][drawn], counters[drawn])
    found = draws.draw(weights, torch.from_numpy(uniform).to(scores.device))
    if len(drawn) == len(scores):
        return found
    tokens = _most_probable(scores)
    tokens[torch.from_numpy(drawn).to(scores.device)] = found
    return tokens


def _most_probable(scores: Float[Tensor, "rows width"]) -> Int64[Tensor, " rows"]:
    """The first of the largest in each row."""
    if scores.device.type != "cpu":
        return scores.argmax(-1)
    # torch's own goes number by number on a CPU, above all in bfloat16.
    return torch.from_numpy(scores.float().numpy(force=True).argmax(-1))


def _logprobs(
    logits: Float[Tensor, "rows vocab"],
    tokens: Int64[np.ndarray, " rows"],
    numbers: Int64[np.ndarray, " rows"],
) -> tuple[Float32[np.ndarray, " rows"], dict[int, TopLogprobs]]:
    """Log-probabilities of the model for rows that ask for some, and for that many top tokens."""
    chosen = np.full(len(tokens), np.nan, dtype=np.float32)
    for places in _chunks(numbers >= 0, logits.shape[1]):
        ids = torch.from_numpy(tokens[places]).to(logits.device)
        chosen[places] = token_logprobs(_taken(logits, places), ids).numpy(force=True)
    top: dict[int, TopLogprobs] = {}
    for number in np.unique(numbers[numbers > 0]).tolist():
        for places in _chunks(numbers == number, logits.shape[1]):
            values = _taken(logits, places).log_softmax(-1, dtype=torch.float32)
            found = values.topk(min(number, logits.shape[1]))
            both = zip(found.indices.numpy(force=True), found.values.numpy(force=True), strict=True)
            top |= {
                place: TopLogprobs(*each) for place, each in zip(places.tolist(), both, strict=True)
            }
    return chosen, top
