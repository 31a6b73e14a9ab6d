"""Text of answers as tokens come: as decoded at once, cut at the first stop, never taken back."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import sentencepiece
from transformers import AddedToken, PreTrainedTokenizerFast

from cascadevl.data.conversation import TEMPLATES
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tokenizer import SPECIAL_TOKENS, build_tokenizer
from cascadevl.engine.sampling import SamplingParams
from cascadevl.engine.stops import AnswerText, end_ids
from cascadevl.engine.text_stream import Channels, Scanner, TextStream, Without
from cascadevl.errors import RequestError
from cascadevl.model.internlm import convert_sentencepiece

WORDS = ["one two three four", "the quick brown fox, über 東京 jumps", "analysis final assistant"]
GPT_OSS = TEMPLATES["internvl3_5_gpt_oss"]


@pytest.fixture(scope="module")
def processor() -> CascadeVLProcessor:
    return CascadeVLProcessor(build_tokenizer(WORDS * 3, 420), system_message="")


@pytest.fixture(scope="module")
def gpt_oss() -> CascadeVLProcessor:
    tokenizer = build_tokenizer(WORDS * 3, 420)
    names = [*GPT_OSS.control_tokens, "<|reserved|>"]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in names])
    return CascadeVLProcessor(tokenizer, template=GPT_OSS.name)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "dummy prefix"])
def internlm(request, tmp_path_factory: pytest.TempPathFactory) -> CascadeVLProcessor:
    folder = tmp_path_factory.mktemp("internlm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 10),
        model_prefix=str(folder / "tokenizer"),
        add_dummy_prefix=request.param,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        character_coverage=0.98,
        minloglevel=2,
    )
    model = convert_sentencepiece(folder / "tokenizer.model")
    model.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return CascadeVLProcessor(PreTrainedTokenizerFast(tokenizer_object=model), system_message="")


def ids_of(processor: CascadeVLProcessor, text: str) -> list[int]:
    return list(processor.tokenizer(text, add_special_tokens=False).input_ids)


def end_of(processor: CascadeVLProcessor) -> int:
    return processor.stop_token_ids()[0]


def run(processor: CascadeVLProcessor, ids: list[int], **wish: Any) -> tuple[AnswerText, list[str]]:
    """Take tokens until the answer ends, or is called off after the last."""
    params = SamplingParams(**{"max_tokens": 10_000} | wish)
    answer, pieces = AnswerText(processor, params, end_ids(processor, params)), []
    for token in ids:
        pieces.append(answer.take(token))
        if answer.finish_reason is not None:
            break
    else:
        pieces.append(answer.cancel())
    assert "".join(pieces) == answer.text
    return answer, pieces


def at_once(processor: CascadeVLProcessor, ids: list[int]) -> str:
    """What all tokens together say."""
    if processor.template.reasoning is None:
        return processor.decode(ids, skip_special_tokens=True)
    control = processor.tokenizer.convert_tokens_to_ids(list(GPT_OSS.control_tokens))
    shown = [token for token in ids if token not in processor.hidden_ids or token in control]
    raw, before = processor.tokenizer.decode(shown), ""
    (opening, closing), final = GPT_OSS.reasoning, GPT_OSS.answer_open
    if raw.startswith(final):
        text = raw[len(final) :]
    else:
        if raw.startswith(opening):
            raw, before = raw[len(opening) :], "<think>\n"
        reasoning, found, rest = raw.partition(closing + final)
        text = before + reasoning + ("\n</think>\n\n" + rest if found else "")
    return re.sub("|".join(map(re.escape, GPT_OSS.control_tokens)), "", text)


def random_ids(processor: CascadeVLProcessor, rng: random.Random) -> list[int]:
    """Words, lone bytes, special tokens, ids that no tokenizer knows, and pieces of channels."""
    tokenizer, ids = processor.tokenizer, []
    special = list(tokenizer.added_tokens_decoder)
    texts = ["one two", " three", "東京🦊", "über", "  ", "<|im_", "abab", "\n\n"]
    if processor.template.reasoning is not None:
        opening, closing = GPT_OSS.reasoning
        texts += [opening, closing, GPT_OSS.answer_open, closing + GPT_OSS.answer_open] * 2
        ids += ids_of(processor, rng.choice([opening, GPT_OSS.answer_open, "x", opening[:14], ""]))
    while len(ids) < 40:
        kind = rng.random()
        if kind < 0.4:
            ids += ids_of(processor, rng.choice(texts))
        elif kind < 0.9:
            ids.append(rng.randrange(len(tokenizer) + 5))
        else:
            ids.append(rng.choice(special))
    return ids


STOPS = ["one", "abab", "wo t", " ", "京", "\n", "think", "e th", "三", "ba"]


def check_random_answers(processor: CascadeVLProcessor, stops: list[str], num: int) -> set[str]:
    reasons = set()
    for seed in range(num):
        rng = random.Random(seed)
        ids = random_ids(processor, rng)
        wish = {"stop": tuple(rng.sample(stops, min(len(stops), rng.randrange(4))))}
        answer, pieces = run(processor, ids, ignore_eos=rng.random() < 0.7, **wish)
        text = at_once(processor, answer.token_ids)
        places = [place for stop in wish["stop"] if (place := text.find(stop)) >= 0]
        assert answer.text == text[: min(places, default=len(text))], (seed, pieces)
        assert answer.token_ids == ids[: len(answer.token_ids)]
        reasons.add(str(answer.finish_reason))
        if places:
            assert answer.ended_by in wish["stop"] or answer.finish_reason == "cancelled"
    return reasons


def test_random_answers_are_as_decoded_at_once(processor: CascadeVLProcessor):
    assert check_random_answers(processor, STOPS, 300) == {"stop", "cancelled"}


def test_random_answers_with_channels_are_as_decoded_at_once(gpt_oss: CascadeVLProcessor):
    assert check_random_answers(gpt_oss, STOPS, 300) == {"stop", "cancelled"}


def test_random_answers_of_sentencepiece_are_as_decoded_at_once(internlm: CascadeVLProcessor):
    check_random_answers(internlm, [], 100)
    answer, _ = run(internlm, ids_of(internlm, "one two three"), stop=("o th",))
    assert answer.text == "one tw"


CHANNELS = {
    "<|channel|>analysis<|message|>1+1<|end|><|start|>assistant<|channel|>final<|message|>2": (
        "<think>\n1+1\n</think>\n\n2"
    ),
    "<|channel|>final<|message|>2": "2",
    "<|channel|>analysis<|message|>1+1": "<think>\n1+1",
}


@pytest.mark.parametrize("raw", list(CHANNELS))
def test_channels_are_written_as_the_processor_writes_them(gpt_oss: CascadeVLProcessor, raw: str):
    ids = ids_of(gpt_oss, raw)
    answer, pieces = run(gpt_oss, [*ids, end_of(gpt_oss)])
    assert answer.text == CHANNELS[raw] == gpt_oss.decode(ids, skip_special_tokens=True)
    assert len([piece for piece in pieces if piece]) > 1 or raw.endswith("2")


def test_reasoning_that_the_prompt_opened_is_streamed_and_closed(gpt_oss: CascadeVLProcessor):
    raw = "one two<|end|><|start|>assistant<|channel|>final<|message|>three"
    answer, pieces = run(gpt_oss, [*ids_of(gpt_oss, raw), end_of(gpt_oss)])
    assert answer.text == "one two\n</think>\n\nthree"
    assert pieces[0]


def test_a_stop_string_that_closes_reasoning_is_found(gpt_oss: CascadeVLProcessor):
    answer, _ = run(gpt_oss, ids_of(gpt_oss, next(iter(CHANNELS))), stop=("</think>",))
    assert (answer.text, answer.finish_reason) == ("<think>\n1+1\n", "stop")


def test_characters_of_several_tokens_come_out_whole(processor: CascadeVLProcessor):
    text = "東京 über 🦊🦊 one"
    answer, pieces = run(processor, [*ids_of(processor, text), end_of(processor)])
    assert answer.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5


def test_bytes_that_never_become_a_character_are_given_at_the_end(processor: CascadeVLProcessor):
    ids = ids_of(processor, "🦊")
    assert len(ids) == 4
    for ending in ({"max_tokens": 3}, {}):
        assert run(processor, ids[:3], **ending)[1][-1] == "\ufffd"
    assert run(processor, [*ids[:3], end_of(processor)])[0].text == "\ufffd"


def test_an_added_token_is_written_as_it_is():
    """Its letters are no bytes, unlike those of all other tokens."""
    tokenizer = build_tokenizer(WORDS, 300)
    tokenizer.add_tokens(["<a 三>"])
    added = CascadeVLProcessor(tokenizer, system_message="")
    ids = ids_of(added, "one<a 三> 京")
    assert len(added.tokenizer) - 1 in ids
    answer, _ = run(added, [*ids, end_of(added)])
    assert answer.text == "one<a 三> 京"


def test_grounding_tokens_stay_and_control_tokens_go(processor: CascadeVLProcessor):
    text = "<ref>fox</ref><box>[[1, 2]]</box>"
    ids = ids_of(processor, f"<|im_start|>{text}<|endoftext|>")
    answer, _ = run(processor, ids)
    assert answer.text == text
    assert answer.token_ids == ids


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((" thr",), "one two"),  # across tokens
        (("o t", "two"), "one tw"),  # the first in the text, though both are in it by then
        (("hree f", "our"), "one two t"),
        (("one",), ""),
        (("four",), "one two three "),
    ],
    ids=str,
)
def test_a_stop_string_ends_the_answer(
    processor: CascadeVLProcessor, stop: tuple[str, ...], text: str
):
    answer, pieces = run(processor, ids_of(processor, "one two three four"), stop=stop)
    if stop == ("o t", "two"):
        text = "one "  # "two" was complete a token before "o t" was
    assert (answer.text, answer.finish_reason) == (text, "stop")
    assert answer.ended_by in stop
    assert "".join(pieces) == text


def test_the_beginning_of_a_stop_string_that_does_not_come_is_given_back(
    processor: CascadeVLProcessor,
):
    ids = ids_of(processor, "one two three")
    answer, pieces = run(processor, [*ids, end_of(processor)], stop=(" two four", "three x"))
    assert answer.text == "one two three"
    assert pieces[-1].endswith("three")  # only the end decided about it


@pytest.mark.parametrize("wish", [{}, {"max_tokens": 3}], ids=["end", "limit"])
def test_a_stop_string_in_what_only_the_end_decides_cuts_the_text(
    gpt_oss: CascadeVLProcessor, wish: dict[str, int]
):
    """Until the end, it may still become the beginning of the final channel."""
    ids = ids_of(gpt_oss, "<|channel|>f") + ids_of(gpt_oss, "i")
    assert len(ids) == 3
    whole, pieces = run(gpt_oss, [*ids, end_of(gpt_oss)], **wish)
    assert (whole.text, pieces[:2]) == ("fi", ["", ""])
    for stop, text in (("f", ""), ("i", "f")):
        cut, _ = run(gpt_oss, [*ids, end_of(gpt_oss)], stop=(stop,), **wish)
        assert (cut.text, cut.finish_reason, cut.ended_by) == (text, "stop", stop)


def test_the_limit_counts_tokens(processor: CascadeVLProcessor):
    ids = ids_of(processor, "one two three four")
    answer, _ = run(processor, ids, max_tokens=2)
    assert (answer.token_ids, answer.finish_reason) == (ids[:2], "length")
    assert answer.ended_by is None
    stopped, _ = run(processor, ids, max_tokens=1, stop=("o",))
    assert stopped.finish_reason == "stop"
    ended, _ = run(processor, [*ids[:1], end_of(processor)], max_tokens=2)
    assert (ended.finish_reason, ended.ended_by) == ("stop", end_of(processor))


def test_tokens_that_end_an_answer(processor: CascadeVLProcessor):
    params = SamplingParams(stop_token_ids=(70, end_of(processor)))
    own = processor.stop_token_ids()
    assert end_ids(processor, params, [60]) == (*own, 60, 70)
    assert end_ids(processor, SamplingParams(stop_token_ids=(70,), ignore_eos=True), 60) == (70,)
    going, _ = run(processor, [end_of(processor), *ids_of(processor, "one")], ignore_eos=True)
    assert (going.text, going.finish_reason) == ("one", "cancelled")


def test_stop_strings_are_not_heeded_before_min_tokens(processor: CascadeVLProcessor):
    ids = ids_of(processor, "one one one")
    num = len(ids_of(processor, "one"))
    answer, _ = run(processor, ids, stop=("one",), min_tokens=num + 1)
    assert answer.finish_reason == "stop"
    assert answer.text == "one "
    assert run(processor, ids, stop=("one",), min_tokens=num)[0].text == ""


def test_a_control_token_in_a_stop_string_is_refused(processor: CascadeVLProcessor):
    with pytest.raises(RequestError, match=r"'x<\|im_end\|>' .*'<\|im_end\|>'.* stop_token_ids"):
        run(processor, [], stop=("x<|im_end|>",))


def test_a_token_costs_the_same_however_long_the_answer_is(
    internlm: CascadeVLProcessor, monkeypatch: pytest.MonkeyPatch
):
    decode, lengths = internlm.tokenizer.decode, []

    def counting(ids: list[int], **options: Any) -> str:
        lengths.append(len(ids))
        return str(decode(ids, **options))

    monkeypatch.setattr(internlm.tokenizer, "decode", counting)
    run(internlm, ids_of(internlm, "one two three four " * 20))
    assert max(lengths) <= 2


def test_what_is_held_back_is_shorter_than_the_longest_string():
    scanner, rng = Scanner(["abcab", "ba"]), random.Random(0)
    for _ in range(2000):
        certain, found = scanner.push(rng.choice("abcd"))
        assert "ba" not in certain
        assert found in (None, "ba", "abcab")
        assert len(scanner._held) < 5


def test_a_scanner_goes_on_behind_what_it_found():
    scanner = Scanner(["<a>", "<ab>"])
    assert scanner.push("x<a>y<ab>z<a") == ("x", "<a>")
    assert scanner.push("") == ("y", "<ab>")
    assert scanner.push("") == ("z", None)
    assert scanner.push("<a>") == ("<a", "<a>")
    assert scanner.push("<") == ("", None)
    assert scanner.flush() == "<"
    assert scanner.flush() == ""
    assert Scanner(["ab", "abc"]).push("xabc") == ("x", "abc")
    assert Scanner(["<a>"]).push("<a><a", search=False) == ("<a>", None)


def test_a_stream_of_nothing_is_nothing(gpt_oss: CascadeVLProcessor, processor: CascadeVLProcessor):
    assert TextStream(gpt_oss).flush() == TextStream(processor).flush() == ""


def test_a_piece_may_hold_more_than_one_thing_to_leave_out():
    without = Without(["<a>", "<b>"])
    assert without.push("1<a>2<b><a>3<b>4<") == "1234"
    assert without.push("a>5") == "5"


def test_a_piece_may_hold_reasoning_and_answer():
    opening, closing = GPT_OSS.reasoning
    change, channels = closing + GPT_OSS.answer_open, Channels(GPT_OSS)
    assert channels.push(f"{opening}1+1{change}2, ") == "<think>\n1+1\n</think>\n\n2, "
    assert channels.push(f"not {change}3") == f"not {change}3"
    assert channels.flush() == ""


def test_the_rest_is_given_once(gpt_oss: CascadeVLProcessor):
    stream = TextStream(gpt_oss)
    assert "".join(map(stream.push, ids_of(gpt_oss, "<|channel|>fi"))) == ""
    assert (stream.flush(), stream.flush()) == ("fi", "")
