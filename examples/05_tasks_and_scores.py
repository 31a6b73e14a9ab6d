# %% [markdown]
# # Tasks, answers and scores
#
# A task draws pictures with questions whose answers can be checked. It gives training records, a
# held-out examination, and later rewards. A scene is a function of (split, seed, index), so
# nothing is stored. Needs the extra `tasks`.

# %%
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cascadevl.eval.runner import run_suite
from cascadevl.eval.suite import SuiteRow
from cascadevl.scoring.metrics import wilson_interval
from cascadevl.tasks import TASKS
from cascadevl.tasks.base import TaskSource, chance_levels
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.shapes import Shapes
from cascadevl.types import Message

print("families:", ", ".join(TASKS))

# %% [markdown]
# ## A scene
#
# Handwriting takes the UCI digits of scikit-learn; the digit images of its test split are never
# seen in training.

# %%
task = Handwriting(difficulty="two", num_questions=4)
scene = task.draw("test", seed=0, index=6)
folder = Path(tempfile.mkdtemp(prefix="cascadevl-"))
scene.image.save(folder / "scene.png")
print(f"{scene.scene_id}: {scene.description!r}, drawn in {folder / 'scene.png'}")
for question in scene.questions:
    print(f"  {question.kind:<12} {question.prompt} -> {question.answer}")

# %% [markdown]
# ## Checking an answer
#
# What counts is what an answer says, not how: steps, thinking and case do not matter.

# %%
question = scene.questions[0]
for text in (question.answer, f"<think>\nhm\n</think>\n\n{question.answer}.", "no idea"):
    print(f"{text!r:<40} {'right' if question.check(text) else 'wrong'}")
assert question.check(question.answer)
assert not question.check("no idea")

# %% [markdown]
# ## As training data
#
# A `TaskSource` is a source of records like any data set. The picture is shared by a branch for
# each question, so it is encoded once.

# %%
record = TaskSource(task=task, length=1000, stage="sft")[0]
print(f"{len(record.branches)} branches; the first: {record.branches[0]}")

# %% [markdown]
# ## What knowing nothing scores
#
# A score means little without the score of always giving the most frequent answer.

# %%
for kind, chance in chance_levels(Shapes(difficulty="easy"), num_scenes=200).items():
    print(f"{kind:<12} {chance.answer!r} is right in {100 * chance.share:.0f} % of {chance.num}")

# %% [markdown]
# ## An examination
#
# Whatever takes conversations and gives answers can be examined: a model (`ModelResponder`), a
# server, or, here, someone who always says yes.


# %%
def yes_sayer(conversations: Sequence[Sequence[Message]]) -> list[str]:
    """Answers every conversation alike."""
    return ["yes"] * len(conversations)


row = SuiteRow(
    name="is there ...?",
    task=Shapes(difficulty="easy", num_questions=4),
    num_questions=100,
    keep=lambda question: question.kind == "existence",
)
(score,) = run_suite(yes_sayer, [row], seed=0)
print(
    f"{score.row}: {100 * score.estimate.value:.0f} % right, the most frequent answer "
    f"{score.baseline.answer!r} scores {100 * score.baseline.share:.0f} %"
)
for answered in score.answered[:3]:
    question = answered.asked.question
    print(f"  {question.prompt} {answered.response} ({'right' if answered.right else 'wrong'})")

# %% [markdown]
# ## How sure
#
# Every share comes with a 95 % interval (Wilson's). With 60 questions it is 25 points wide; with
# 400, ten.

# %%
for num in (60, 400):
    low, high = wilson_interval(num // 2, num)
    print(f"{num // 2} of {num}: {100 * low:.0f} to {100 * high:.0f} %")
