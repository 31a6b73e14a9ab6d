"""Another family's pictures told in words: the same questions, asked of a text.

A decoder that has learned to count, compare and add from descriptions needs only to learn to see,
when it meets the pictures. The reports start from language models that can do so already.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cascadevl.tasks.base import Scene, Split, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """Scenes of a family without their pictures.

    Attributes:
        task: The family. Every question is asked about its scene's dense description.
    """

    task: Task

    @property
    def name(self) -> str:
        """The family's, marked."""
        return f"{self.task.name}, described"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The family's."""
        return self.task.kinds

    def draw(self, split: Split, seed: int, index: int) -> Scene:
        """The scene of that split, seed and index, told in words."""
        scene = self.task.draw(split, seed, index)
        questions = tuple(
            replace(question, prompt=f"{scene.description}\n{question.prompt}")
            for question in scene.questions
        )
        return Scene(
            scene_id=f"described/{scene.scene_id}",
            images=(),
            questions=questions,
            description="",
        )
