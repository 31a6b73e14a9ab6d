"""Solutions that are judged step by step, as conversations: the multi-turn form of VisualPRM.

The first turn shows the question and the first step, every later turn one more step, and each is
answered with "+" or "-". Training, scoring and the released files share this form. What stands
around question and steps is the released prompt, or a short one for models to which a page of
instructions is noise (docs/decisions/0033); files are always in the released form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from cascadevl.data.encoding import TextEncoder
from cascadevl.data.example import ExampleBuilder
from cascadevl.data.prompts import PROCESS_QUESTION, PROCESS_REWARD_SYSTEM, PROCESS_SOLUTION
from cascadevl.data.writing import conversation_fields
from cascadevl.errors import ConfigError, DataError
from cascadevl.losses.process_reward import LabelTokens
from cascadevl.types import Example, ImageRef, Message, Part, Record

PLUS, MINUS = "+", "-"
"""The two answers: all is right so far, or it is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """What stands around question and steps.

    Attributes:
        system: The system message.
        question: Before the question.
        solution: Between the question and the first step.
    """

    system: str
    question: str
    solution: str


WORDINGS: Mapping[str, Wording] = {
    "released": Wording(
        system=PROCESS_REWARD_SYSTEM, question=PROCESS_QUESTION, solution=PROCESS_SOLUTION
    ),
    "short": Wording(system="Right so far? + or -", question="", solution="\n\n"),
}
"""By the name that a checkpoint's configuration has (``process_prompt``)."""

RELEASED = WORDINGS["released"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedSolution:
    """A solution with a label for each step.

    Attributes:
        question: The user's turn: pictures and the question.
        steps: The steps.
        labels: Whether the solution is right up to each of them.
    """

    question: Message
    steps: tuple[str, ...]
    labels: tuple[bool, ...]


def judged_question(prompt: Sequence[Message]) -> Message:
    """What a solution answers, as one turn: the last one of the user, with earlier pictures first.

    A process reward model was trained on single questions; system message and earlier answers are
    left out.

    Args:
        prompt: The conversation that the solution answers.

    Raises:
        DataError: Of kind ``bad_turns``, if the last turn is not the user's.
    """
    if not prompt or prompt[-1].role != "user":
        raise DataError(
            "the conversation does not end with a question",
            kind="bad_turns",
            source="prompt",
            remedy="end it with a turn of the user",
        )
    before = [turn for turn in prompt[:-1] if turn.role == "user"]
    shown = [part for turn in before for part in turn.parts if isinstance(part, ImageRef)]
    return replace(prompt[-1], parts=(*shown, *prompt[-1].parts))


def opening(question: Message, wording: Wording = RELEASED) -> Message:
    """The first turn up to where the first step begins.

    Args:
        question: Pictures and the question.
        wording: What stands around it.
    """
    before = (wording.question,) if wording.question else ()
    return Message("user", (*before, *question.parts, wording.solution))


def step_turns(steps: Sequence[str], labels: Sequence[bool]) -> Iterator[Message]:
    """Steps and answers in turn.

    Args:
        steps: The steps.
        labels: What is answered to each.
    """
    for step, label in zip(steps, labels, strict=True):
        yield Message.of("user", step)
        yield Message.of("assistant", PLUS if label else MINUS)


def conversation_of(judged: JudgedSolution, wording: Wording = RELEASED) -> tuple[Message, ...]:
    """A judged solution as the conversation that is trained on.

    Args:
        judged: The solution; it has a step.
        wording: What stands around question and steps.
    """
    first, *rest = step_turns(judged.steps, judged.labels)
    begun = opening(judged.question, wording)
    system = Message.of("system", wording.system)
    return (system, replace(begun, parts=begun.parts + first.parts), *rest)


def candidates_record(
    question: Message,
    candidates: Sequence[Sequence[str]],
    *,
    source: str,
    wording: Wording = RELEASED,
) -> Record:
    """Several solutions of one question, as branches that share it and its pictures.

    Every answer is "+": it holds the place of the one that is scored, and stands before the later
    steps as in the public code.

    Args:
        question: Pictures and the question.
        candidates: The steps of each solution, at least one.
        source: Named in errors.
        wording: What stands around question and steps.
    """
    return Record(
        source=source,
        record_id=source,
        messages=(Message.of("system", wording.system), opening(question, wording)),
        branches=tuple(tuple(step_turns(steps, [True] * len(steps))) for steps in candidates),
    )


def process_fields(
    judged: JudgedSolution, *, record_id: str, images: Sequence[str] = (), mc: Sequence[float]
) -> dict[str, Any]:
    """One line of the released format.

    Args:
        judged: The solution.
        record_id: The record's ``id``.
        images: Paths of the pictures, in the order they are shown, as they are to be written.
        mc: Share of right continuations from each step, kept as ``mc``, so that another threshold
            needs no new continuations; readers of the released format pass over it.

    Raises:
        DataError: If the line could not be read back.
    """
    turns = conversation_of(judged)
    return {**conversation_fields(turns, record_id=record_id, images=images), "mc": list(mc)}


def read_judged(record: Record) -> JudgedSolution:
    """The solution of a record in the released form; its system message may be missing.

    Args:
        record: The record.

    Raises:
        DataError: Of kind ``bad_turns``, if it is none, saying what is wrong.
    """
    turns = [turn for turn in record.messages if turn.role != "system"]
    labels = labels_in(record)
    shown, begun = _joined(turns[0].parts), PROCESS_QUESTION
    text = shown[-1]
    if not (isinstance(shown[0], str) and shown[0].startswith(begun)) or not (
        isinstance(text, str) and PROCESS_SOLUTION in text
    ):
        raise _no_process(record, f"the first turn has no {PROCESS_SOLUTION.strip()!r}")
    before, _, step = text.rpartition(PROCESS_SOLUTION)
    parts = [*shown[:-1], before]
    parts[0] = str(parts[0]).removeprefix(begun)
    return JudgedSolution(
        question=Message("user", tuple(part for part in parts if part != "")),
        steps=(step, *(turn.text for turn in turns[2::2])),
        labels=labels,
    )


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Parts with neighbouring texts as one, as they are in a file."""
    joined: list[Part] = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(last := joined[-1], str):
            joined[-1] = last + part
        else:
            joined.append(part)
    return joined


def labels_in(record: Record) -> tuple[bool, ...]:
    """The labels of a record in the released form.

    Args:
        record: The record.

    Raises:
        DataError: Of kind ``bad_turns``, if steps and answers do not alternate, or an answer is
            neither "+" nor "-".
    """
    turns = [turn for turn in record.messages if turn.role != "system"]
    if record.branches or [t.role for t in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise _no_process(record, "its turns are not steps and answers by turns")
    answers = [turn.text for turn in turns[1::2]]
    if wrong := [answer for answer in answers if answer not in (PLUS, MINUS)]:
        raise _no_process(record, f"a step is answered with {wrong[0]!r:.40}")
    return tuple(answer == PLUS for answer in answers)


def _no_process(record: Record, what: str) -> DataError:
    return DataError(
        f"the record is no solution with judged steps: {what}",
        kind="bad_turns",
        source=record.source,
        field="conversations",
        remedy='give question and first step, then a step a turn, each answered with "+" or "-"',
    )


def label_tokens(builder: ExampleBuilder) -> LabelTokens:
    """The tokens of "+" and "-" where an answer says one of them.

    Args:
        builder: Brings tokenizer and template.

    Raises:
        ConfigError: If the answers differ in more than one token.
    """
    encode, template = TextEncoder(builder.tokenizer), builder.template
    found = set()
    for end in (template.answer_end, template.last_answer_end):
        answers = encode([f"{template.answer_open}{label}{end}" for label in (PLUS, MINUS)])
        found.add(tuple(pair for pair in zip_longest(*answers, fillvalue=-1) if len(set(pair)) > 1))
    (differing, *others) = found
    if others or len(differing) != 1 or min(differing[0]) < 0:
        raise ConfigError(
            'the tokenizer has no single tokens for the answers "+" and "-", so that a process '
            "reward model cannot be made of this one; use the tokenizer of the checkpoint"
        )
    plus, minus = differing[0]
    return LabelTokens(plus=plus, minus=minus)


class StepBuilder:
    """Makes examples of judged solutions in which exactly the labels are targets, one a step."""

    def __init__(self, builder: ExampleBuilder, prompt: str = "released") -> None:
        """Bind what makes examples.

        Args:
            builder: Of the model.
            prompt: What stands around question and steps: a key of `WORDINGS`.

        Raises:
            ConfigError: If "+" and "-" are no tokens of it.
        """
        self._builder, self.tokens = builder, label_tokens(builder)
        self._wording = WORDINGS[prompt]

    def __call__(self, record: Record, *, epoch: int = 0) -> Example:
        """Make the training example of a solution.

        With the released prompt a record is taken as it is, and a missing system message put in
        front; with another one it is written anew.

        Args:
            record: In the released form.
            epoch: How often its data set was seen before.

        Raises:
            DataError: If it is no solution with judged steps, or cannot be used.
        """
        labels_in(record)
        if self._wording is not RELEASED:
            turns = conversation_of(read_judged(record), self._wording)
            record = replace(record, messages=turns)
        elif record.messages[0].role != "system":
            system = Message.of("system", RELEASED.system)
            record = replace(record, messages=(system, *record.messages))
        return self._marked(record, epoch)

    def candidates(
        self, question: Message, candidates: Sequence[Sequence[str]], *, source: str
    ) -> Example:
        """Make the example that scores several solutions of one question at once.

        Args:
            question: Pictures and the question.
            candidates: The steps of each solution.
            source: Named in errors.

        Raises:
            DataError: If a step or a picture cannot be used.
        """
        record = candidates_record(question, candidates, source=source, wording=self._wording)
        return self._marked(record, 0)

    def _marked(self, record: Record, epoch: int) -> Example:
        example = self._builder(record, epoch=epoch)
        turns = [*record.messages, *(turn for branch in record.branches for turn in branch)]
        num_answers = sum(turn.role == "assistant" for turn in turns)
        tokens = (self.tokens.plus, self.tokens.minus)
        is_label = example.trained & np.isin(example.input_ids, tokens)
        assert int(is_label.sum()) == num_answers, "an answer is one label and what closes it"
        return replace(example, trained=is_label)
