"""The hallucination guard: claims of an answer are held against the pictures and against documents.

An answer is taken apart into claims (`cascadevl.scoring.claims`), each with a question that yes or
no answers. The model itself is asked it again about the pictures, in a conversation of its own, and
about the passages of documents that fit; its P(yes) decides, by limits that can be calibrated.
docs/concepts/guard.md tells what that can and cannot do.

A guard computes nothing: it says what is to be asked (`Guard.plan`) and what follows from the
answers (`Guard.conclude`), so that the terminal, the server and evaluation ask as they like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cascadevl.data.documents import Documents, Passage
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.backends import Backend, generate
from cascadevl.engine.best_of_n import FAULTS_OF_TEXTS
from cascadevl.engine.probes import YesNo, first_top, probe, yes_probability
from cascadevl.engine.requests import Completion, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import ConfigError, DataError, RequestError
from cascadevl.scoring.claims import Claim, claims_of, claims_of_lines
from cascadevl.scoring.verdicts import (
    Evidence,
    Limits,
    Verification,
    decided,
    finding_of,
    revised,
)
from cascadevl.types import Example, Message

EXTRACT_PROMPT = (
    "Write down everything that the following answer claims, one short sentence with a subject a "
    "line, and nothing else.\n\nQuestion: {question}\nAnswer: {answer}"
)
"""Asks a model for the claims of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """How claims are found and checked.

    Attributes:
        limits: From the probability that a claim holds to what a source says.
        wordings: How a question is put about pictures; of several, the mean of P(yes) counts.
        reads: How it is put about a passage.
        answers: How it is asked whether a passage has anything to say about it.
        answers_from: From this P(yes) on it has.
        num_passages: Passages asked about each claim.
        min_overlap: Share of a claim's terms that a passage must hold to be asked at all.
        extractor: Who finds claims: rules, or the model itself by a prompt.
        max_extracted: Most tokens of the claims that a model writes down.
        max_claims: Most claims that are checked; later ones are not.
    """

    limits: Limits = field(default_factory=Limits)
    wordings: tuple[str, ...] = ("{question}",)
    reads: str = "{passage}\n\nAccording to this text: {question}"
    answers: str = "{passage}\n\nDoes this text answer the following question? {question}"
    answers_from: float = 0.5
    num_passages: int = 2
    min_overlap: float = 0.5
    extractor: Literal["rules", "model"] = "rules"
    max_extracted: int = 512
    max_claims: int = 32

    def __post_init__(self) -> None:
        """Check the numbers and the places in the wordings.

        Raises:
            ConfigError: If one means nothing.
        """
        for name in ("num_passages", "max_extracted", "max_claims"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("answers_from", "min_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in 0 to 1")
        if not self.wordings or not all("{question}" in each for each in self.wordings):
            raise ConfigError(f"wordings are {self.wordings}; each must hold {{question}}")
        for text in (self.reads, self.answers):
            if "{question}" not in text or "{passage}" not in text:
                raise ConfigError(f"{text!r} must hold {{passage}} and {{question}}")


@dataclass(frozen=True, slots=True)
class _Probe:
    """A question to the model.

    Attributes:
        request: The question; None where its text cannot be asked.
        claim: Number of the claim that it checks.
        passage: What is read; None for the pictures. Each passage has two questions: whether it
            has anything to say, then what.
    """

    request: Request | None
    claim: int
    passage: Passage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be asked about an answer.

    Attributes:
        answer: The answer.
        claims: Its claims.
        probes: Questions about them.
    """

    answer: str
    claims: tuple[Claim, ...]
    probes: tuple[_Probe, ...]

    @property
    def requests(self) -> list[Request]:
        """What to ask, in order."""
        return [each.request for each in self.probes if each.request is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Checks the claims of answers.

    Attributes:
        processor: Makes prompts for the model that is asked.
        config: How claims are found and checked.
        documents: What else they are held against.
    """

    processor: CascadeVLProcessor
    config: GuardConfig = field(default_factory=GuardConfig)
    documents: Documents | None = None

    def has_sources(self, about: Request) -> bool:
        """Whether there is anything that an answer can be held against.

        Args:
            about: What was asked, by an example of the processor.
        """
        assert isinstance(about.prompt, Example), "what was asked is an example of the processor"
        return bool(about.prompt.tiles_per_image) or self.documents is not None

    def check_sources(self, about: Request) -> None:
        """Refuse an answer that cannot be held against anything.

        Args:
            about: What was asked.

        Raises:
            RequestError: If there is neither a picture nor a document.
        """
        if not self.has_sources(about):
            raise RequestError(
                "there is nothing to verify an answer against: show a picture, or name a folder "
                "with documents"
            )

    def extraction(self, question: str, answer: str, about: Request) -> Request | None:
        """What asks the model for the claims of an answer; None where rules find them.

        Args:
            question: What was asked.
            answer: What was said.
            about: The request that asked.

        Raises:
            DataError: If question or answer hold control tokens.
        """
        if self.config.extractor == "rules":
            return None
        text = EXTRACT_PROMPT.format(question=question, answer=answer)
        return replace(
            about,
            prompt=self.processor.prompt([Message.of("user", text)]),
            sampling=SamplingParams(max_tokens=self.config.max_extracted),
            num_samples=1,
            increments=None,
            visual_budget=None,
            stream=False,
        )

    def plan(
        self, question: str, answer: str, about: Request, extracted: str | None = None
    ) -> Plan:
        """What is to be asked about an answer.

        Args:
            question: What was asked.
            answer: What was said.
            about: The request that asked, by an example of the processor.
            extracted: What the model wrote to `extraction`; None has rules find the claims.

        Raises:
            RequestError: If there is neither a picture nor a document.
        """
        self.check_sources(about)
        if extracted is None:
            claims = claims_of(answer, question)
        else:
            claims = claims_of_lines(extracted, answer, question)
        claims = claims[: self.config.max_claims]
        probes = [
            probe
            for number, claim in enumerate(claims)
            for probe in (
                *self._of_pictures(number, claim, about),
                *self._of_texts(number, claim, about),
            )
        ]
        return Plan(answer=answer, claims=tuple(claims), probes=tuple(probes))

    def conclude(self, plan: Plan, completions: Sequence[Completion]) -> Verification:
        """What the answers to a plan's questions say.

        Args:
            plan: The plan.
            completions: Answers to its requests, in order.
        """
        words = YesNo.of(self.processor.tokenizer)
        answered = iter(completions)
        by_claim: list[list[tuple[_Probe, float | None]]] = [[] for _ in plan.claims]
        for each in plan.probes:
            top = () if each.request is None else first_top(next(answered))
            by_claim[each.claim].append((each, yes_probability(top, words)))
        checks = tuple(
            decided(claim, self._evidence(claim, mine))
            for claim, mine in zip(plan.claims, by_claim, strict=True)
        )
        return Verification(answer=plan.answer, checks=checks, text=revised(plan.answer, checks))

    def _of_pictures(self, number: int, claim: Claim, about: Request) -> list[_Probe]:
        assert isinstance(about.prompt, Example), "checked before"
        if not about.prompt.tiles_per_image:
            return []
        texts = [wording.format(question=claim.question) for wording in self.config.wordings]
        return [_Probe(self._asked(text, about, shows=True), number) for text in texts]

    def _of_texts(self, number: int, claim: Claim, about: Request) -> list[_Probe]:
        if self.documents is None:
            return []
        config = self.config
        found = self.documents.search(
            claim.question, config.num_passages, min_overlap=config.min_overlap
        )
        probes = []
        for passage in (each.passage for each in found):
            for form in (config.answers, config.reads):
                text = form.format(passage=passage.text, question=claim.question)
                probes.append(_Probe(self._asked(text, about, shows=False), number, passage))
        return probes

    def _asked(self, text: str, about: Request, *, shows: bool) -> Request | None:
        try:
            return probe(self.processor, text, about, shows=shows)
        except DataError as error:
            if error.kind not in FAULTS_OF_TEXTS:
                raise
            return None

    def _evidence(
        self, claim: Claim, answers: Sequence[tuple[_Probe, float | None]]
    ) -> list[Evidence]:
        """What the pictures say, and what the passage says that has most to say."""
        seen = [chance for each, chance in answers if each.passage is None]
        evidence = []
        if seen:
            known = [chance for chance in seen if chance is not None]
            evidence.append(self._of(claim, "picture", sum(known) / len(known) if known else None))
        if self.documents is not None:
            evidence.append(self._of_passages(claim, answers))
        return evidence

    def _of_passages(
        self, claim: Claim, answers: Sequence[tuple[_Probe, float | None]]
    ) -> Evidence:
        """What the passage says that has most to say, if one has something."""
        read: dict[Passage, list[float]] = {}  # P(it has something to say), P(yes)
        for each, chance in answers:
            if each.passage is not None and chance is not None:
                read.setdefault(each.passage, []).append(chance)
        whole = {passage: both for passage, both in read.items() if len(both) == 2}
        best = max(whole, key=lambda passage: whole[passage][0], default=None)
        if best is None or whole[best][0] < self.config.answers_from:
            return Evidence(source="documents", probability=None, finding="undecided")
        return self._of(claim, best.source, whole[best][1], best.text)

    def _of(self, claim: Claim, source: str, yes: float | None, passage: str = "") -> Evidence:
        holds = 1 - yes if yes is not None and claim.is_negative else yes
        return Evidence(
            source=source,
            probability=holds,
            finding=finding_of(holds, self.config.limits),
            passage=passage,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer that is to be checked.

    Attributes:
        about: The request that it answers, by an example of the processor.
        question: The text of what was asked.
        answer: The answer.
    """

    about: Request
    question: str
    answer: str


def verify(backend: Backend, guard: Guard, answers: Sequence[Said]) -> list[Verification]:
    """Check answers; all probes of all of them are asked together.

    Args:
        backend: Answers probes; it gives log-probabilities.
        guard: Says what to ask.
        answers: The answers.

    Raises:
        RequestError: If one cannot be held against anything, or a probe does not fit the trained
            context.
    """
    texts: list[str | None] = [None] * len(answers)
    if guard.config.extractor == "model":
        wishes = [guard.extraction(each.question, each.answer, each.about) for each in answers]
        found = generate(backend, [each for each in wishes if each is not None])
        texts = [said.text for (said,) in found]
    plans = [
        guard.plan(each.question, each.answer, each.about, text)
        for each, text in zip(answers, texts, strict=True)
    ]
    said = iter(generate(backend, [request for plan in plans for request in plan.requests]))
    return [guard.conclude(plan, [next(said)[0] for _ in plan.requests]) for plan in plans]
