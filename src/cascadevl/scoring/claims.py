"""An answer as claims: what it says, one by one, each with a question that yes or no answers.

Rules for plain English sentences, lists and short answers, without a model. They need not
understand everything: what they cannot turn into a question of its own is asked whole ("Is it true
that ...?"). Questions are always asked positively and negative claims marked as such, because
models say yes to a negation as readily as to its opposite.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One thing that an answer says.

    Attributes:
        text: In the answer's words.
        question: What is asked to check it.
        is_negative: Whether "no" is the answer that the claim gives to the question.
        span: Where it stands in the answer, first character and end; None where it does not stand
            there word for word.
        opposite: What the answer says without it, where something must be said; mostly nothing.
    """

    text: str
    question: str
    is_negative: bool = False
    span: Span | None = None
    opposite: str = ""


_YES_NO_OPENERS = frozenset(
    (
        *("is", "are", "was", "were", "am", "do", "does", "did", "can", "could", "has", "have"),
        *("had", "will", "would", "should"),
    )
)
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_PLURALS = frozenset((*_NUMBERS, "several", "many", "some", "few", "both", "these", "those"))
_DETERMINERS = _PLURALS | frozenset(
    (
        *("a", "an", "the", "this", "that", "one", "all", "no", "there", "it", "they", "he"),
        *("she", "its", "their", "his", "her"),
    )
)
_VOWELS = "aeiou"

# A full stop in a number, an abbreviation or behind the number of a line ends nothing. Nothing that
# follows can fail, so that hostile answers take linear time.
_SENTENCE = re.compile(
    r"(?:[^.!?;\n]|(?:\.(?=[0-9a-z])|(?<=\bMr)\.|(?<=\b[DS][rt])\.|(?<=\bMrs)\."
    r"|(?<=\be\.g)\.|(?<=\bi\.e)\.|(?<=^[0-9])\.(?= .)|(?<=^[0-9][0-9])\.(?= .)))+[.!?;]?",
    re.MULTILINE,
)
_ASKED = re.compile(r"[^.!?\n]+[.!?\n]?")
_REPLY = re.compile(r"\s{0,8}(yes|no)\b", re.IGNORECASE)
_BULLET = re.compile(r"(?:[-*\u2022]|[0-9]{1,3}[.)])\s{1,4}")
_FINAL = re.compile(r"(?:final )?answer:\s{0,4}", re.IGNORECASE)
_IN_PICTURE = re.compile(
    r"(?:in|on) (?:the|this) (?:image|picture|photo|photograph)(?:, ?| )", re.IGNORECASE
)
_SHOWN = re.compile(
    r"(?:i (?:can )?see"
    r"|(?:the|this) (?:image|picture|photo|photograph) (?:shows|contains|depicts|has)"
    r"|there (?:is|are|was|were)(?P<no>\snot|\sno|n't)?)\s",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"(?:,\s|\s)(?:and|but|while|whereas)\s(?=(?:there|the|a|an|it|they|its|their|this|these)\s"
    r"[^,]{0,80}?\b(?:is|are|was|were|has|have|can|will)\b)",
    re.IGNORECASE,
)
_MORE = r"(?:a|an|the|one|two|three|four|five|six|several|some|many|no|[0-9]{1,4})\s"
_ITEM = re.compile(rf"(?:,\s(?:and\s)?|\sand\s)(?={_MORE})")
_BARE_ITEM = re.compile(rf",\s(?:and\s)?|\sand\s(?={_MORE})")
_INVERTED = re.compile(
    r"(?P<subject>[^,]{1,120}?)\s(?P<verb>is|are|was|were|can|will)(?P<no>\snot|n't)?\s(?P<rest>.+)",
    re.IGNORECASE,
)
_OWNED = re.compile(r"(?P<subject>[^,]{1,120}?)\s(?P<verb>has|have)\s(?P<rest>.+)", re.IGNORECASE)
_VERB = re.compile(r"\b(?:is|are|was|were|has|have|can|will)\b", re.IGNORECASE)
_PLACE = re.compile(
    r"\s(?:(?:top|bottom|upper|lower|middle)\s)?(?:left|right|center|centre|top|bottom|middle)$"
)
_PRONOUN = re.compile(r"(?:(?P<one>it)|they)\s", re.IGNORECASE)
_COLOUR = re.compile(
    r"(?:what|which) colou?r (?P<verb>is|are|does|do) (?P<of>.+?)(?: have)?\?", re.IGNORECASE
)
_HOW_MANY = re.compile(r"how many (?P<of>.+?) (?:are|is|can|do)\b.*\?", re.IGNORECASE)
_WHERE = re.compile(r"(?:where|what) (?P<verb>is|are) (?P<of>.+)\?", re.IGNORECASE)
_SHORT_WORDS = 6
_FILLERS = frozenset(("sure", "certainly", "of course", "okay", "ok", "yes", "no", "unknown"))


def asked_question(text: str) -> str:
    """The question in what somebody asked: the last sentence with a question mark, or nothing.

    Args:
        text: Of the turn.
    """
    found = [sentence for sentence in _ASKED.findall(text) if sentence.endswith("?")]
    return found[-1].strip() if found else ""


def claims_of(answer: str, asked: str = "") -> list[Claim]:
    """What an answer says, in order; reasoning before ``</think>`` says nothing yet.

    Args:
        answer: The whole answer.
        asked: What it answers; gives meaning to answers of a word.
    """
    start = answer.rfind("</think>") + len("</think>") if "</think>" in answer else 0
    if "<think>" in answer[start:]:
        return []
    question, claims = asked_question(asked), list[Claim]()
    reply = _REPLY.match(answer, start)
    if reply and _is_yes_no(question):
        claims.append(_reply_claim(reply, question))
        start = reply.end()
    reader = _Reader(question)
    for begin, end in _sentences(answer, start):
        claims += reader.read(answer, begin, end)
    return claims


def claims_of_lines(lines: str, answer: str, asked: str = "") -> list[Claim]:
    """Claims that a model has written down, one a line, held against the answer that they are of.

    Args:
        lines: What it wrote.
        answer: The answer; a line that stands in it word for word is found there.
        asked: What that answers.
    """
    claims = []
    reader = _Reader(asked_question(asked))
    for begin, end in _sentences(lines, 0):
        for claim in reader.read(lines, begin, end):
            place = answer.find(claim.text)
            span = None if place < 0 else (place, place + len(claim.text))
            claims.append(replace(claim, span=span))
    return claims


def _is_yes_no(question: str) -> bool:
    return question.partition(" ")[0].lower() in _YES_NO_OPENERS


def _reply_claim(reply: re.Match[str], question: str) -> Claim:
    word = reply[1]
    other = {"yes": "no", "no": "yes"}[word.lower()]
    return Claim(
        text=word,
        question=question,
        is_negative=word.lower() == "no",
        span=reply.span(1),
        opposite=other.capitalize() if word[0].isupper() else other,
    )


def _sentences(text: str, start: int) -> Iterator[Span]:
    """Sentences and lines, without bullets, marks at the end and blanks around."""
    for match in _SENTENCE.finditer(text, start):
        begin, end = match.span()
        piece = match[0]
        if piece.rstrip(" \t*_").endswith(("?", ":")):  # asks, or says what is to come
            continue
        begin += len(piece) - len(piece.lstrip(" \t,:*_#\"'"))
        bullet = _BULLET.match(text, begin, end)
        begin = bullet.end() if bullet else begin
        end = begin + len(text[begin:end].rstrip(" \t.!;,:*_\"'"))
        said = text[begin:end]
        if any(letter.isalnum() for letter in said) and said.lower() not in _FILLERS:
            yield begin, end


@dataclass(slots=True)
class _Reader:
    """Reads sentences one after the other.

    Attributes:
        asked: The question that all of them answer.
        subject: What the last one spoke of; stands for "it" or "they".
        is_one: Which of the two.
    """

    asked: str
    subject: str = ""
    is_one: bool = True
    _claims: list[Claim] = field(default_factory=list)

    def read(self, text: str, begin: int, end: int) -> list[Claim]:
        """The claims of a sentence that stands there in a text."""
        self._claims = []
        final = _FINAL.match(text, begin, end)
        if final:
            self._answer(text, final.end(), end)
            return self._claims
        lead = _IN_PICTURE.match(text, begin, end)
        begin = lead.end() if lead else begin
        sentence = text[begin:end]
        if _SHOWN.match(sentence) or _VERB.search(sentence):
            self._clauses(text, begin, end)
        elif self._is_short(sentence):
            self._answer(text, begin, end)
        else:
            self._list(text, begin, end)
        return self._claims

    def _is_short(self, sentence: str) -> bool:
        is_open = bool(self.asked) and not _is_yes_no(self.asked)
        return is_open and len(sentence.split()) <= _SHORT_WORDS and "," not in sentence

    def _answer(self, text: str, begin: int, end: int) -> None:
        """An answer of few words, which says something only together with its question."""
        said = text[begin:end]
        if not said:
            return
        question = _answered(self.asked, said) if self.asked else existence_question(said)
        self._claims.append(Claim(text=said, question=question, span=(begin, end)))

    def _list(self, text: str, begin: int, end: int) -> None:
        """Things without a verb; a head before a colon says how many."""
        head, colon, _ = text[begin:end].partition(":")
        if colon and not any(letter.isdigit() for letter in head):
            begin += len(head) + 1
        elif colon:
            self._thing(text, (begin, begin + len(head)), head, False)
            begin += len(head) + 1
        begin += len(text[begin:end]) - len(text[begin:end].lstrip())
        for start, stop in _parts(_BARE_ITEM, text, begin, end):
            self._thing(text, (start, stop), _PLACE.sub("", text[start:stop].rstrip()), False)

    def _thing(self, text: str, span: Span, thing: str, is_negative: bool) -> None:
        """Something that is said to be there, or not to be."""
        if not any(letter.isalnum() for letter in thing):
            return
        question = existence_question(thing)
        self.subject = "the " + _without_article(thing.strip())
        self.is_one = question.startswith("Is ")
        self._claims.append(
            Claim(
                text=text[slice(*span)],
                question=question,
                is_negative=is_negative or thing.lower().startswith("no "),
                span=span,
            )
        )

    def _clauses(self, text: str, begin: int, end: int) -> None:
        for start, stop in _parts(_CLAUSE, text, begin, end):
            clause = text[start:stop]
            if shown := _SHOWN.match(clause):
                first = start + shown.end()
                for number, (left, right) in enumerate(_parts(_ITEM, text, first, stop)):
                    span = (left if number else start, right)  # "there is" belongs to the first
                    self._thing(text, span, text[left:right], shown["no"] is not None)
                continue
            question, is_negative = self._question(clause)
            self._claims.append(
                Claim(text=clause, question=question, is_negative=is_negative, span=(start, stop))
            )

    def _question(self, clause: str) -> tuple[str, bool]:
        """A clause turned into a question, and whether the clause denies it."""
        pronoun = _PRONOUN.match(clause)
        if self.subject and pronoun and self.is_one == (pronoun["one"] is not None):
            clause = f"{self.subject} {clause[pronoun.end() :]}"
        if found := _INVERTED.fullmatch(clause):
            self.subject = _lowered(found["subject"])
            verb = found["verb"].capitalize()
            self.is_one = verb not in ("Are", "Were")
            return f"{verb} {self.subject} {found['rest']}?", found["no"] is not None
        if found := _OWNED.fullmatch(clause):
            self.subject = _lowered(found["subject"])
            self.is_one, rest = found["verb"].lower() == "has", found["rest"]
            does = "Does" if self.is_one else "Do"
            is_negative = rest.lower().startswith("no ")
            rest = _with_article(rest[3:]) if is_negative else rest
            return f"{does} {self.subject} have {rest}?", is_negative
        return f"Is it true that {_lowered(clause)}?", False


def _parts(border: re.Pattern[str], text: str, begin: int, end: int) -> Iterator[Span]:
    """What stands between borders."""
    start = begin
    for match in border.finditer(text, begin, end):
        yield start, match.start()
        start = match.end()
    yield start, end


def existence_question(thing: str) -> str:
    """Whether something is there.

    Args:
        thing: ``a red circle``, ``red circle``, ``two dogs``, ``the dog``, ``no dog``.
    """
    words = thing.split()
    first = words[0].lower()
    if first == "no":
        words = words[1:] or words
        first = words[0].lower()
    is_number = first.isdecimal() and first != "1"
    looks_plural = words[-1].lower().endswith("s") and not words[-1].lower().endswith("ss")
    bare = first not in _DETERMINERS and not first.isdecimal()
    if is_number or first in _PLURALS or (bare and looks_plural):
        return f"Are there {_lowered(' '.join(words))}?"
    return f"Is there {_with_article(' '.join(words))}?"


def _without_article(thing: str) -> str:
    first, _, rest = thing.partition(" ")
    return rest if rest and first.lower() in ("a", "an", "the", "one", "1") else _lowered(thing)


def _with_article(thing: str) -> str:
    """``a red circle`` of ``the red circle``, ``one red circle`` and ``Red circle``."""
    bare = _without_article(thing)
    return f"{'an' if bare[:1].lower() in _VOWELS else 'a'} {bare}"


def _lowered(text: str) -> str:
    """The beginning of a sentence within one: small, unless it is a name."""
    first = text.split(maxsplit=1)[0] if text.split() else ""
    return text[:1].lower() + text[1:] if first.lower() in _DETERMINERS else text


def _answered(asked: str, said: str) -> str:
    """Whether a short answer to a question is right, as a question of its own."""
    if found := _COLOUR.fullmatch(asked):
        verb = "Are" if found["verb"].lower() in ("are", "do") else "Is"
        return f"{verb} {found['of']} {said}?"
    if found := _HOW_MANY.fullmatch(asked):
        return f"Is the number of {found['of']} {said}?"
    found = _WHERE.fullmatch(asked)
    if found and found["of"].lower().startswith(("in ", "on ")):
        return existence_question(said)
    if found:
        return f"{found['verb'].capitalize()} {found['of']} {said}?"
    return f'Is "{said}" the right answer to the question "{asked}"?'
