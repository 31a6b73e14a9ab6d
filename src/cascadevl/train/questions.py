"""The questions of a run of reinforcement learning, a rollout batch at a time, resumable.

The order is a function of seed and position, so two numbers say where a run stands. Every process
reads all questions of a batch and keeps its share: so the batches are the same on any number of
processes, broken questions included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cascadevl.data.collate import num_tokens
from cascadevl.data.conversation import system_text
from cascadevl.data.example import ExampleBuilder
from cascadevl.data.permutation import named_key, permuted
from cascadevl.data.prompts import BOXED_INSTRUCTION
from cascadevl.data.stream import Skipped, skipped_of
from cascadevl.errors import ConfigError, DataError, TrainingError
from cascadevl.tasks.naming import task_named
from cascadevl.tasks.problems import FileProblems, Problem, Problems, TaskProblems
from cascadevl.train.gspo_config import GSPOConfig, ProblemsConfig
from cascadevl.types import Example, Message

MOST_SKIPPED = 1000
"""Groups of questions in a row that may be unusable before a run gives up."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A question as it is asked.

    Attributes:
        number: Which question of the run it is; names the random stream of its answers.
        problem: The question, with how answers are checked.
        messages: The turns that are shown, the system's included where there is one.
        prompt: What the engine answers and what is trained on: one and the same.
    """

    number: int
    problem: Problem
    messages: tuple[Message, ...]
    prompt: Example


def problems_of(config: ProblemsConfig) -> Problems:
    """The questions that a configuration names.

    Raises:
        ConfigError: If it names none, or a task that does not exist.
        DataError: If the file cannot be read.
    """
    if config.file is not None:
        return FileProblems(config.file, root=config.root)
    if not config.tasks:
        raise ConfigError(
            "there is nothing to ask; name a file of questions and answers with --questions "
            "FILE.jsonl (problems.file), or tasks with --problems.tasks '[handwriting:add]'"
        )
    return TaskProblems(
        tasks=[task_named(name, px=config.px) for name in config.tasks],
        num_scenes=config.scenes,
        worked_only=False,
    )


class Asker:
    """Turns problems into prompts, and refuses those that are too long."""

    def __init__(self, builder: ExampleBuilder, config: GSPOConfig) -> None:
        """Bind the run's builder.

        Args:
            builder: Makes prompts; with the run's limit of tiles.
            config: The run.
        """
        self._builder, self._config = builder, config

    def __call__(self, problem: Problem, number: int) -> Asked:
        """The prompt of a problem.

        Args:
            problem: What is asked.
            number: Which question of the run it is.

        Raises:
            DataError: If a picture cannot be used, or the prompt is too long.
        """
        rollout, builder = self._config.rollout, self._builder
        user = problem.prompt
        if rollout.boxed:
            user = replace(user, parts=(*user.parts, f"\n{BOXED_INSTRUCTION}"))
        thinking = True if rollout.thinking else None
        prompt = builder.prompt([user], thinking=thinking, source=problem.problem_id)
        size, tiles = num_tokens(prompt, builder.tokens_per_tile), prompt.num_tiles
        if size > rollout.max_prompt_tokens or tiles > self._config.batch.row_tiles:
            raise DataError(
                f"{size} tokens and {tiles} tiles, but rollout.max_prompt_tokens is "
                f"{rollout.max_prompt_tokens} and batch.row_tiles {self._config.batch.row_tiles}",
                kind="too_long",
                source=problem.problem_id,
                remedy="raise them, or lower data.max_tiles",
            )
        config = builder.config
        system = system_text([user], builder.template, system=config.system, thinking=thinking)
        messages = (Message.of("system", system), user) if system else (user,)
        return Asked(number, problem, messages, prompt)


class QuestionStream:
    """Rollout batches of questions, in an order that resumes exactly."""

    def __init__(
        self,
        problems: Problems,
        ask: Callable[[Problem, int], Asked],
        *,
        num_prompts: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Start at the first question.

        Args:
            problems: What there is to ask.
            ask: Makes a prompt of a problem and its number in the run; a `DataError` leaves it
                out.
            num_prompts: Questions of a batch, of all processes together.
            seed: Of the order.
            rank: Which of the processes this is.
            world_size: Number of processes, among which a batch is dealt out.

        Raises:
            ConfigError: If there are no questions, or a batch cannot be dealt out evenly.
        """
        if not len(problems):
            raise ConfigError("there are no questions to ask: the file or the list is empty")
        if num_prompts % world_size:
            raise ConfigError(
                f"rollout.prompts is {num_prompts}, which {world_size} processes cannot share "
                "evenly; use a multiple"
            )
        self._problems, self._ask = problems, ask
        self._num_prompts, self._seed = num_prompts, seed
        self._rank, self._world_size = rank, world_size
        self._group, self._offset = 0, 0  # the next question: of which group, and which of it
        self._number = 0  # questions asked so far
        self._skipped: dict[tuple[str, str], Skipped] = {}

    def __iter__(self) -> Iterator[list[Asked]]:
        """Itself: a stream is read once, and goes on where it stands."""
        return self

    def __next__(self) -> list[Asked]:
        """This process's questions of the next batch.

        Raises:
            DataError: If no question can be used for long; the text gives the counts.
        """
        batch: list[Asked] = []
        barren = 0
        while len(batch) < self._num_prompts:
            before = len(batch)
            self._take_group(batch)
            barren = 0 if len(batch) > before else barren + 1
            if barren == min(MOST_SKIPPED, len(self._problems)):
                raise self._nothing_left(barren)
        return batch[self._rank :: self._world_size]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch; plain JSON."""
        counted = self._skipped.items() if self._rank == 0 else ()  # every process meets them
        return {
            "problems": self._problems.settings(),
            "group": self._group,
            "offset": self._offset,
            "number": self._number,
            "world_size": None,  # any number of processes goes on from here
            "skipped": [
                [name, kind, skipped.count, skipped.first] for (name, kind), skipped in counted
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream stood.

        Raises:
            TrainingError: If the questions are others.
        """
        then, now = state["problems"], self._problems.settings()
        if then != now:
            raise TrainingError(
                f"the run cannot be resumed: its questions were {then} when the state was saved "
                f"and are {now} now"
            )
        self._group, self._offset = state["group"], state["offset"]
        self._number = state["number"]
        self._skipped = skipped_of(state)

    def _take_group(self, batch: list[Asked]) -> None:
        """Questions of the next group, as many as the batch still lacks."""
        epoch, place = divmod(self._group, len(self._problems))
        key = named_key(self._seed, f"questions/{epoch}")
        try:
            problems = self._problems[permuted(place, len(self._problems), key)]
        except DataError as error:
            self._skip(error)
            problems = []
        while self._offset < len(problems) and len(batch) < self._num_prompts:
            try:
                batch.append(self._ask(problems[self._offset], self._number))
                self._number += 1
            except DataError as error:
                self._skip(error)
            self._offset += 1
        if self._offset >= len(problems):
            self._group, self._offset = self._group + 1, 0

    def _skip(self, error: DataError) -> None:
        key = ("questions", error.kind)
        before = self._skipped.get(key, Skipped(count=0, first=str(error)))
        self._skipped[key] = Skipped(count=before.count + 1, first=before.first)

    def _nothing_left(self, barren: int) -> DataError:
        counts = Counter({kind: each.count for (_, kind), each in self._skipped.items()})
        firsts = "".join(f"\n  first {kind}: {s.first}" for (_, kind), s in self._skipped.items())
        return DataError(
            f"{barren} groups of questions in a row cannot be used; left out so far: "
            f"{dict(counts)}{firsts}",
            kind="too_many_skipped",
            remedy="mend the questions, or raise the limits that they exceed",
        )
