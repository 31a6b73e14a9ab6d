# %% [markdown]
# # Thinking data
#
# A model that thinks on request is fine-tuned on worked solutions that begin with the Thinking
# system prompt, and on direct answers that do not. Solutions are filtered first: a right answer,
# one well-formed block of thinking, no repetition, nothing unclear. Needs the extra `tasks`.

# %%
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cascadevl.data.conversation import thinking_answer
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.meta import read_meta
from cascadevl.data.prompts import THINKING_PROMPT
from cascadevl.data.records import JsonlSource
from cascadevl.data.spans import describe
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.scoring.answers import final_answer, numeric_match
from cascadevl.scoring.reasoning import fault_of, repetition
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.problems import TaskProblems
from cascadevl.tasks.text import Text
from cascadevl.types import Message
from cascadevl.workflows.thinking_config import ThinkingConfig
from cascadevl.workflows.thinking_data import make_thinking_data

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## What is wrong with a solution
#
# Each solution is counted under the first rule that it breaks.

# %%
question = "What is 27 + 45?"
steps = "7 + 5 = 12, carry 1, 2 + 4 + 1 = 7"
solutions = {
    "good": f"<think>\n{steps}\n</think>\n\n72",
    "wrong": f"<think>\n{steps}\n</think>\n\n71",
    "direct": "72",
    "cut short": f"<think>\n{steps}",
    "says two things": f"<think>\n{steps}. The answer is 62\n</think>\n\n72",
    "loops": f"<think>\n{'wait, let me add the ones once more. ' * 9}\n</think>\n\n72",
}


def is_right(text: str) -> bool:
    """Whether the final answer is 72."""
    return numeric_match(final_answer(text), "72")


for name, text in solutions.items():
    fault = fault_of(text, question=question, check=is_right)
    print(f"{name:<16} {fault or 'kept'}")
assert fault_of(solutions["good"], question=question, check=is_right) is None
assert fault_of(solutions["loops"], question=question, check=is_right) == "repetitive"

# %% [markdown]
# ## How repetitive is a text?
#
# The share of sequences of ten words that occur more than once; above 0.4 a solution is dropped.

# %%
for times in (1, 2, 3, 9):
    share = repetition("wait, let me add the ones once more. " * times)
    print(f"said {times} times: {share:.2f}")

# %% [markdown]
# ## From the tasks' own steps
#
# Many tasks know how their answers are found. `cascadevl data think` does the same from the command
# line.

# %%
tasks = [Text(num_questions=3), Handwriting(difficulty="add_digits")]
problems = TaskProblems(tasks=tasks, num_scenes=40)
report = make_thinking_data(problems, ThinkingConfig(out=folder / "tasks"))
print(f"{report.num_thinking} thinking and {report.num_direct} direct records of {report.meta}")

# %% [markdown]
# ## From whoever answers
#
# A responder takes conversations and gives answers: a checkpoint (`ModelResponder`), a server
# (`UrlResponder`), or, here, somebody careless, who is asked three times each.


# %%
def careless(conversations: Sequence[Sequence[Message]]) -> list[str]:
    """Always answers 7, now and then without thinking."""
    thought = thinking_answer("it looks like a seven to me", "7")
    return [thought if number % 3 else "7" for number, _ in enumerate(conversations)]


report = make_thinking_data(
    problems,
    ThinkingConfig(out=folder / "careless", num_samples=3, own=False),
    responder=careless,
)
print(f"{report.num_solutions} solutions, {report.num_thinking} kept; dropped: {report.dropped}")
assert report.num_thinking + sum(report.dropped.values()) == report.num_solutions

# %% [markdown]
# ## What is trained
#
# The thinking, the answer and the end of the turn. The system prompt, which alone says the mode, is
# read and not learned.

# %%
tokenizer = build_tokenizer([THINKING_PROMPT, question, *solutions.values()], 600)
builder = ExampleBuilder(tokenizer, ExampleConfig(system=""), tokens_per_tile=16)
for spec in read_meta(folder / "tasks" / "meta.json"):
    example = builder(JsonlSource(spec)[0])
    print(f"--- {spec.name}")
    for span in describe(example, tokenizer):
        mark = "trained" if span.trained else "read"
        text = span.text if len(span.text) < 200 else f"{span.text[:60]} ... {span.text[-60:]}"
        print(f"[{mark}, {span.num_tokens} tokens] {text!r}")

# %% [markdown]
# ## Going on
#
# Making data takes hours with a large model. With `resume` an interrupted attempt goes on at the
# last finished group; finished work is only counted again.

# %%
again = make_thinking_data(problems, ThinkingConfig(out=folder / "tasks", resume=True))
print(json.dumps({"thinking": again.num_thinking, "direct": again.num_direct}))
