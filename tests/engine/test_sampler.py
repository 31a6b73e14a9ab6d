"""Sampling many rows at once: as by hand, each row by itself, with the right frequencies."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.reference import sampling_by_hand
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cascadevl.engine import draws, sampler
from cascadevl.engine.sampler import Allowed, Sampled, sample
from cascadevl.engine.sampling import SamplingParams, SamplingTable
from cascadevl.errors import LogitsError, RequestError

VOCAB = 150


def logits_of(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def table_of(params: Sequence[SamplingParams], vocab: int = VOCAB, **extra: Any) -> SamplingTable:
    table = SamplingTable(vocab)
    for number, each in enumerate(params):
        assert table.add(f"request {number}", each, **extra) == number
    return table


def ask(
    logits: Tensor,
    params: Sequence[SamplingParams],
    counters: Sequence[int] | None = None,
    allowed: Allowed | None = None,
    **extra: Any,
) -> Sampled:
    table = table_of(params, logits.shape[1], **extra)
    numbers = np.zeros(len(params), np.int64) if counters is None else np.array(counters)
    return sample(logits, table, np.arange(len(params)), numbers, allowed)


def some_allowed(places: Sequence[int], vocab: int = VOCAB) -> Allowed:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.rand(len(places), vocab, generator=generator) < 0.4
    return Allowed(np.array(places, dtype=np.int64), tokens)


COMBINATIONS = list(
    itertools.product((0.0, 0.7, 1.6), (0, 12), (1.0, 0.8), (0.0, 0.05), (1.0, 1.4), (0, 20))
)


def test_every_combination_of_wishes_draws_as_by_hand():
    """All combinations, each with and without a grammar, in one call a token."""
    params = [
        SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=penalty,
            min_tokens=min_tokens,
            seed=seed,
        )
        for seed, (temperature, top_k, top_p, min_p, penalty, min_tokens) in enumerate(
            COMBINATIONS * 2
        )
    ]
    constrained = list(range(len(COMBINATIONS), 2 * len(COMBINATIONS)))
    prompt, ends = [3, 5, 5, 140], [7, 9]
    seen = [set(prompt) for _ in params]
    table = table_of(params, token_ids=prompt, end_ids=ends)
    for counter in (0, 1, 19, 20, 21):
        logits = logits_of(len(params), seed=counter)
        logits[:, 7] += 4  # a likely end
        allowed = some_allowed(constrained)
        rows = np.arange(len(params))
        got = sample(logits, table, rows, np.full(len(params), counter), allowed)
        for row, wish in enumerate(params):
            forbidden = set(ends) if counter < wish.min_tokens else set()
            if row in constrained:
                mask = allowed.tokens[row - len(COMBINATIONS)]
                forbidden |= set((~mask).nonzero().flatten().tolist())
            probabilities = sampling_by_hand.distribution(
                logits[row].tolist(),
                temperature=wish.temperature,
                top_k=wish.top_k,
                top_p=wish.top_p,
                min_p=wish.min_p,
                repetition_penalty=wish.repetition_penalty,
                seen=seen[row],
                forbidden=forbidden,
            )
            number = sampling_by_hand.uniform(wish.seed, 0, counter)
            assert got.tokens[row] == sampling_by_hand.drawn(probabilities, number), wish
            seen[row].add(int(got.tokens[row]))


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Distance of counts from what is expected, in standard deviations of chi-square."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    assert expected.min() > 5, "too rare for chi-square"
    freedom = possible.sum() - 1
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


WISHES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 7},
    {"temperature": 1.4, "top_p": 0.7, "min_p": 0.1},
]


def frequencies(wish: dict[str, Any], numbers: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """How often each of 12 tokens is drawn, for sample numbers and token numbers."""
    logits = torch.linspace(-1, 2, 12)[torch.randperm(12, generator=torch.Generator())]
    table = SamplingTable(12)
    params = SamplingParams(seed=11, **wish)
    rows = np.array([table.add("r", params, number=int(number)) for number in numbers])
    got = sample(logits.repeat(len(rows), 1), table, rows, counters)
    expected = sampling_by_hand.distribution(logits.tolist(), **wish)
    counts = np.bincount(got.tokens, minlength=12)
    assert abs(chi_square(counts, np.array(expected))) < 4  # fails 1 of about 10,000 seeds
    return got.tokens


@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_tokens_come_as_often_as_they_should(wish: dict[str, Any]):
    num = 3000
    along = frequencies(wish, np.zeros(num, np.int64), np.arange(num))
    across = frequencies(wish, np.arange(num), np.zeros(num, np.int64))
    assert (along != across).mean() > 0.5


def test_draws_do_not_depend_on_those_before_or_beside_them():
    """Pairs of draws, of neighbouring tokens and of neighbouring samples, are independent."""
    num, probabilities = 4000, np.array([0.4, 0.3, 0.2, 0.1])
    logits = torch.tensor(probabilities).log().float().repeat(num, 1)
    table, params = SamplingTable(4), SamplingParams(temperature=1.0, seed=5)
    rows = np.array([table.add("r", params, number=number) for number in range(num)])
    first, second = (sample(logits, table, rows, np.full(num, at)).tokens for at in (0, 1))
    pairs = np.outer(probabilities, probabilities).ravel()
    for one, other in ((first, second), (first[:-1], first[1:])):
        counts = np.bincount(one * 4 + other, minlength=16)
        assert abs(chi_square(counts, pairs)) < 4


def mixed(num: int) -> list[SamplingParams]:
    choices = [*COMBINATIONS, (1.0, 0, 0.9999, 0.0, 1.0, 0), (1.0, 500, 1.0, 0.0, 1.0, 0)]
    return [
        SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=penalty,
            min_tokens=min_tokens,
            seed=number,
            logprobs=(None, 0, 3, 7)[number % 4],
        )
        for number, (temperature, top_k, top_p, min_p, penalty, min_tokens) in enumerate(
            itertools.islice(itertools.cycle(choices), num)
        )
    ]


@pytest.mark.parametrize(
    ("num", "vocab", "threads"), [(512, 1000, 1), (24, 151_936, 2)], ids=["many", "wide"]
)
def test_a_row_gives_the_same_bits_whatever_stands_beside_it(num: int, vocab: int, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params, logits = mixed(num), logits_of(num, vocab)
        counters, constrained = np.arange(num) % 40, np.arange(0, num, 5)
        grammar = some_allowed(constrained.tolist(), vocab)
        extra = {"token_ids": [1, 2, 3], "end_ids": [4]}
        table = table_of(params, vocab, **extra)
        whole = sample(logits, table, np.arange(num), counters, grammar)
        order = np.random.default_rng(0).permutation(num)
        groups = [order[:1], order[1:2], order[2:9], order[9:]]
        for group in groups:
            table = table_of(params, vocab, **extra)
            places = np.flatnonzero(np.isin(group, constrained))
            inside = torch.from_numpy(np.searchsorted(constrained, group[places]))
            part = sample(
                logits[torch.from_numpy(group)],
                table,
                group,
                counters[group],
                Allowed(places, grammar.tokens[inside]) if len(places) else None,
            )
            assert part.tokens.tolist() == whole.tokens[group].tolist()
            assert part.logprobs.tobytes() == whole.logprobs[group].tobytes()
            for place, row in enumerate(group.tolist()):
                assert (place in part.top) == (row in whole.top)
                if row in whole.top:
                    mine, theirs = part.top[place], whole.top[row]
                    assert mine.token_ids.tolist() == theirs.token_ids.tolist()
                    assert mine.logprobs.tobytes() == theirs.logprobs.tobytes()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("chunk", [3 * VOCAB, VOCAB - 1], ids=["three rows", "less than a row"])
def test_rows_worked_on_in_groups_are_as_in_one(monkeypatch: pytest.MonkeyPatch, chunk: int):
    params, logits = mixed(100), logits_of(100)
    whole = ask(logits, params)
    monkeypatch.setattr(sampler, "_CHUNK", chunk)
    parts = ask(logits, params)
    assert parts.tokens.tolist() == whole.tokens.tolist()
    assert parts.logprobs.tobytes() == whole.logprobs.tobytes()
    assert parts.top.keys() == whole.top.keys()


class Operations(TorchDispatchMode):
    """Names of the operations that torch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(**wish: Any) -> set[str]:
    with Operations() as seen:
        ask(logits_of(4), [SamplingParams(**wish)] * 4)
    return seen.names


def test_no_row_pays_for_what_no_row_wishes():
    greedy = operations()
    assert "amax" in greedy, "what is done is seen"
    assert not greedy & {"_softmax", "_log_softmax", "topk", "sort", "cumsum", "where", "index"}
    drawn = operations(temperature=1.0)
    assert "_softmax" in drawn
    assert not drawn & {"topk", "sort", "_log_softmax", "index"}
    assert "topk" in operations(temperature=1.0, top_p=0.9)
    assert "_log_softmax" in operations(logprobs=0)


def test_the_first_of_equals_is_taken_by_greedy_rows():
    logits = torch.zeros(2, VOCAB)
    logits[:, [40, 20, 60]] = 1.0
    assert ask(logits, [SamplingParams(), SamplingParams(min_tokens=1)]).tokens.tolist() == [20, 20]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6])
def test_a_very_small_temperature_is_greedy(temperature: float):
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(50)]
    logits = logits_of(50)
    assert ask(logits, params).tokens.tolist() == logits.argmax(-1).tolist()


def test_the_only_token_that_is_not_masked_is_chosen():
    logits = torch.full((50, VOCAB), -math.inf)
    logits[torch.arange(50), torch.arange(50)] = -1e30
    params = [
        SamplingParams(temperature=float(number % 3), top_p=0.5, top_k=9, min_p=0.5, seed=number)
        for number in range(50)
    ]
    assert ask(logits, params).tokens.tolist() == list(range(50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_precision_are_sampled_in_float32(dtype: torch.dtype):
    logits, params = logits_of(60).to(dtype), mixed(60)
    got, expected = ask(logits, params), ask(logits.float(), params)
    assert got.tokens.tolist() == expected.tokens.tolist()


def test_logprobs_are_the_models_own():
    """Neither penalty nor grammar, temperature or filters change them."""
    logits = logits_of(3)
    wish = {"repetition_penalty": 2.0, "temperature": 0.3, "top_k": 4, "min_tokens": 5}
    params = [
        SamplingParams(logprobs=0, **wish),
        SamplingParams(**wish),
        SamplingParams(logprobs=4),
    ]
    got = ask(logits, params, allowed=some_allowed([0]), token_ids=[1], end_ids=[2])
    exact = [math.log(sum(math.exp(value) for value in row)) for row in logits.tolist()]
    for row in (0, 2):
        expected = logits[row, got.tokens[row]].item() - exact[row]
        assert got.logprobs[row] == pytest.approx(expected, abs=1e-5)
    assert math.isnan(got.logprobs[1])
    assert set(got.top) == {2}
    best = sorted(range(VOCAB), key=lambda token: -logits[2, token].item())[:4]
    assert got.top[2].token_ids.tolist() == best
    expected = [logits[2, token].item() - exact[2] for token in best]
    assert got.top[2].logprobs.tolist() == pytest.approx(expected, abs=1e-5)


def test_no_more_top_logprobs_come_than_there_are_tokens():
    got = ask(logits_of(1, 5), [SamplingParams(logprobs=20)])
    assert sorted(got.top[0].token_ids.tolist()) == [0, 1, 2, 3, 4]


def test_what_is_said_becomes_less_likely():
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([8.0, 7.0, 6.0, 5.0])
    table = table_of([SamplingParams(repetition_penalty=2.0)], token_ids=[0])
    rows = np.array([0])
    said = [int(sample(logits, table, rows, np.array([at])).tokens[0]) for at in range(4)]
    # 0 counts 4 from the start; then 1 counts 3.5, 2 counts 3 and 3 counts 2.5.
    assert said == [1, 2, 3, 0]


def test_an_interrupted_sample_goes_on_as_if_it_had_not_been():
    params = SamplingParams(temperature=1.0, repetition_penalty=1.5, min_tokens=4, seed=3)
    extra = {"number": 2, "end_ids": [0]}
    logits = [logits_of(1, seed=seed) for seed in range(8)]
    table = SamplingTable(VOCAB)
    row, said = table.add("one", params, token_ids=[5, 6], **extra), []
    for at in range(8):
        if at == 3:
            table.remove(row)
            assert table.add("another", SamplingParams()) == row
            row = table.add("one", params, token_ids=[5, 6, *said], **extra)
        said.append(int(sample(logits[at], table, np.array([row]), np.array([at])).tokens[0]))
    whole = table_of([params], token_ids=[5, 6], **extra)
    expected = [
        int(sample(logits[at], whole, np.array([0]), np.array([at])).tokens[0]) for at in range(8)
    ]
    assert said == expected


BROKEN = [
    (math.nan, "request 1, token 9: the largest logit is nan: weights or activations"),
    (math.inf, "request 1, token 9: the largest logit is inf"),
    (-math.inf, "request 1, token 9: no token is allowed"),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("value", "message"), BROKEN)
def test_broken_logits_name_their_request_and_leave_the_others(
    value: float, message: str, temperature: float
):
    params = [
        SamplingParams(temperature=temperature, seed=seed, repetition_penalty=1.2)
        for seed in range(4)
    ]
    logits = logits_of(4)
    logits[[1, 3]] = value if value == -math.inf else logits[[1, 3]]
    logits[[1, 3], 77] = value
    table, counters = table_of(params), np.array([8, 9, 10, 11])
    seen = table.seen([0, 1, 2, 3]).clone()
    with pytest.raises(LogitsError, match=message) as raised:
        sample(logits, table, np.arange(4), counters)
    assert raised.value.places == (1, 3)
    assert torch.equal(table.seen([0, 1, 2, 3]), seen)
    good = np.array([0, 2])
    again = sample(logits[[0, 2]], table, good, counters[good]).tokens
    logits[[1, 3]] = 0.0
    assert again.tolist() == ask(logits, params, [8, 9, 10, 11]).tokens[good].tolist()


def test_logits_that_are_no_numbers_are_refused_where_nothing_changes_them():
    """Greedy rows without a penalty take the largest logit as it comes, and NaN is that."""
    logits = logits_of(3)
    logits[1, 77] = math.nan
    with pytest.raises(LogitsError, match="request 1, token 0: the largest logit is nan") as raised:
        ask(logits, [SamplingParams()] * 3)
    assert raised.value.places == (1,)


def test_a_grammar_that_allows_nothing_is_an_error():
    nothing = Allowed(np.array([1]), torch.zeros(1, VOCAB, dtype=torch.bool))
    for temperature in (0.0, 1.0):
        with pytest.raises(LogitsError, match="request 1, token 0: no token is allowed") as raised:
            ask(logits_of(2), [SamplingParams(temperature=temperature)] * 2, allowed=nothing)
        assert raised.value.places == (1,)


def test_an_error_about_logits_crosses_processes():
    error = pickle.loads(pickle.dumps(LogitsError("what", places=(1, 2))))
    assert (str(error), error.places) == ("what", (1, 2))
    assert isinstance(error, RequestError)


def test_rows_of_the_table_are_used_again_and_grow():
    table = SamplingTable(VOCAB)
    wishes = [SamplingParams(temperature=1.0, seed=seed) for seed in range(40)]
    rows = [table.add(f"r{seed}", wish) for seed, wish in enumerate(wishes)]
    assert sorted(rows) == list(range(40))
    for row in rows[5:15]:
        table.remove(row)
    assert len(table) == 30
    again = [table.add(f"new {row}", wishes[row]) for row in rows[5:15]]
    assert again == rows[5:15]
    assert table.name(7) == "new 7"
    logits = logits_of(40)
    got = sample(logits, table, np.arange(40), np.zeros(40, np.int64))
    assert got.tokens.tolist() == ask(logits, wishes).tokens.tolist()


def test_an_empty_step_chooses_nothing():
    none = np.zeros(0, np.int64)
    got = sample(logits_of(0), SamplingTable(VOCAB), none, none)
    assert got.tokens.shape == got.logprobs.shape == (0,)


def test_the_width_of_scores_is_whole_blocks():
    for vocab in (1, 127, 128, 129):
        scores = draws.scores_of(torch.zeros(2, vocab))
        assert scores.shape[1] % draws.BLOCK == 0
        assert torch.isneginf(scores[:, vocab:]).all()
        tokens = ask(
            torch.zeros(64, vocab), [SamplingParams(temperature=9.0, seed=8)] * 64, [*range(64)]
        ).tokens
        assert tokens.max() < vocab
