"""What a task is: seeded pictures with questions whose answers can be checked.

A task draws scenes from material that others made (digits, tables, words) or from simple
geometry. A scene is a pure function of (split, seed, index), so that a training stream, a
held-out set and a rollout prompt are all named by three values and need no storage. `TaskSource`
turns scenes into records, which the data path treats like those of any file.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import PIL.Image

from cascadevl.data.conversation import thinking_answer
from cascadevl.errors import ConfigError
from cascadevl.scoring import answers
from cascadevl.types import ImageRef, Message, Part, Record

Split: TypeAlias = Literal["train", "test"]
Stage: TypeAlias = Literal["pretrain", "sft", "document"]
Style: TypeAlias = Literal["short", "steps", "think"]
Metric: TypeAlias = Literal[
    "exact", "number", "relaxed", "anls", "vqa", "list", "box", "choice", "math"
]

DESCRIBE_PROMPT = "Describe the picture."

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with the answer that counts as right.

    Attributes:
        prompt: The text asked.
        answer: The reference answer, short.
        kind: What is asked for, for example ``"first_digit"``; scores are kept by kind.
        reasoning: Worked steps that lead to the answer, or None.
        metric: How an answer is compared with the reference.
        choices: Letter and text of each choice, for metric ``"choice"``.
    """

    prompt: str
    answer: str
    kind: str
    reasoning: str | None = None
    metric: Metric = "exact"
    choices: tuple[tuple[str, str], ...] = ()

    def check(self, text: str) -> bool:
        """Whether a whole response (steps and thinking included) gives the right answer."""
        given = answers.final_answer(text)
        if self.metric == "choice":
            return answers.multiple_choice_match(given, self.answer, dict(self.choices))
        return answers.MATCHERS[self.metric](given, self.answer)

    def response(self, style: Style = "steps") -> str:
        """The response to train on.

        Args:
            style: ``"short"`` gives the answer alone; ``"steps"`` puts worked steps in front,
                where there are any; ``"think"`` puts them between thinking tags.
        """
        if self.reasoning is None or style == "short":
            return self.answer
        if style == "think":
            return thinking_answer(self.reasoning, self.answer)
        return f"{self.reasoning}\nAnswer: {self.answer}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """One picture (or none, or several) and what can be asked about it.

    Attributes:
        scene_id: Identity: task, settings, split, seed and index.
        images: The pictures, RGB, in the order they are shown; none for tasks of text alone.
        questions: In the order they are asked.
        description: A dense description; empty for tasks of text alone.
    """

    scene_id: str
    images: tuple[PIL.Image.Image, ...]
    questions: tuple[Question, ...]
    description: str

    @property
    def image(self) -> PIL.Image.Image | None:
        """The first picture, for most tasks the only one; None if there is none."""
        return self.images[0] if self.images else None


@runtime_checkable
class Task(Protocol):
    """A family of scenes.

    Attributes:
        name: Short name, a key of ``TASKS``.
        kinds: Every kind of question this task, as set up, can ask.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def kinds(self) -> tuple[str, ...]: ...  # noqa: D102
    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """The scene of that split, seed and index; always the same one."""
        ...


def check_difficulty(name: str, difficulty: str, known: Collection[str]) -> None:
    """Refuse a difficulty that a family does not have.

    Args:
        name: Of the family.
        difficulty: What was asked for.
        known: What there is.

    Raises:
        ConfigError: Naming those that there are.
    """
    if difficulty not in known:
        raise ConfigError(f"{name} has no difficulty {difficulty!r}; choose from {sorted(known)}")


def scene_generator(name: str, split: Split, seed: int, index: int) -> np.random.Generator:
    """A random stream of its own for every scene."""
    # crc32 and not hash(): the latter differs between processes.
    return np.random.default_rng([zlib.crc32(f"{name}/{split}".encode()), seed, index])


def pick(generator: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, evenly."""
    return options[int(generator.integers(len(options)))]


def pick_kinds(
    generator: np.random.Generator, kinds: Sequence[str], num_questions: int
) -> list[str]:
    """Up to that many different kinds, in random order."""
    order = generator.permutation(len(kinds))[:num_questions]
    return [kinds[int(number)] for number in order]


def to_record(scene: Scene, *, task: str, stage: Stage = "sft", style: Style = "steps") -> Record:
    """A scene as the data path takes it: pictures once, every question a branch from them.

    ``sft``: the user's turn opens with the pictures alone; each branch continues that turn with a
    question and adds the answer. ``pretrain``: the same, and a first branch that asks for the
    dense description. ``document``: one interleaved pre-training text, picture first, then the
    description, the questions and the answers. A scene without picture is a conversation of
    one turn a question.

    Args:
        scene: The scene.
        task: Name of the task, which becomes the record's data set.
        stage: What the record is for.
        style: How answers with worked steps are written.
    """
    pairs = [(question.prompt, question.response(style)) for question in scene.questions]
    if stage in ("pretrain", "document") and scene.description:
        pairs.insert(0, (DESCRIBE_PROMPT, scene.description))
    messages: tuple[Message, ...]
    branches: tuple[tuple[Message, ...], ...] = ()
    if stage == "document":
        pictures: tuple[Part, ...] = (*_shown(scene), "\n") if scene.images else ()
        lines = [f"{prompt} {response}" for prompt, response in pairs]
        if scene.description:
            lines[0] = scene.description
        messages = (Message.of("pretrain", *pictures, "\n".join(lines)),)
    elif not scene.images:
        messages = tuple(turn for pair in pairs for turn in _turns(*pair))
    else:
        messages = (Message.of("user", *_shown(scene)),)
        # A picture and its question stand on lines of their own, as in released data.
        branches = tuple(_turns(f"\n{prompt}", response) for prompt, response in pairs)
    return Record(
        source=scene.scene_id,
        record_id=scene.scene_id,
        messages=messages,
        branches=branches,
        dataset=task,
    )


def to_prompt(scene: Scene, question: Question) -> tuple[Message, ...]:
    """A question as a conversation that waits for its answer, in the form it was trained in."""
    if not scene.images:
        return (Message.of("user", question.prompt),)
    return (Message.of("user", *_shown(scene), f"\n{question.prompt}"),)


def _shown(scene: Scene) -> tuple[ImageRef, ...]:
    """The pictures side by side, without a text between them: positions go to what is seen."""
    return tuple(ImageRef(image) for image in scene.images)


def _turns(prompt: str, response: str) -> tuple[Message, Message]:
    return Message.of("user", prompt), Message.of("assistant", response)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """A task as a source of records, for mixtures (`cascadevl.data.source.Source`).

    Attributes:
        task: The task, set up with its picture size and difficulty.
        split: Which part of the material.
        length: Number of records; scenes are drawn, so it may be as large as wanted.
        seed: Seed of the scenes.
        stage: What the records are for.
        style: How answers with worked steps are written.
        label: Name of the source, where several of one task share a mixture; the task's if empty.
        max_tiles: The source's own limit of tiles a picture.
        augment: Whether pictures are degraded in training.
    """

    task: Task
    split: Split = "train"
    length: int
    seed: int = 0
    stage: Stage = "sft"
    style: Style = "steps"
    label: str = ""
    max_tiles: int | None = None
    augment: bool = False

    @property
    def name(self) -> str:
        """The label, or the task's name."""
        return self.label or self.task.name

    def __len__(self) -> int:
        """Number of records."""
        return self.length

    def __getitem__(self, index: int) -> Record:
        """Draw a record.

        Raises:
            IndexError: If there are not so many.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"record {index} of {self.length} of task {self.name!r}")
        scene = self.task.draw(self.split, self.seed, index)
        record = to_record(scene, task=self.name, stage=self.stage, style=self.style)
        return replace(record, max_tiles=self.max_tiles, augment=self.augment)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """What always giving the most frequent answer scores.

    Attributes:
        answer: That answer.
        share: How often it is right.
        num: Number of questions looked at.
    """

    answer: str
    share: float
    num: int


def chance_levels(
    task: Task, split: Split = "test", *, seed: int = 0, num_scenes: int = 500
) -> dict[str, Chance]:
    """The most frequent answer of every kind of question, found by drawing scenes.

    Args:
        task: The task.
        split: Which part of the material.
        seed: Seed of the scenes.
        num_scenes: How many scenes to look at.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for index in range(num_scenes):
        for question in task.draw(split, seed, index).questions:
            counts[question.kind][question.answer] += 1
    levels = {}
    for kind, counter in sorted(counts.items()):
        answer, most = counter.most_common(1)[0]
        levels[kind] = Chance(answer=answer, share=most / counter.total(), num=counter.total())
    return levels
