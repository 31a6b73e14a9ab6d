"""What can be asked and checked: seeded examples with answers from material that others made."""

from __future__ import annotations

from collections.abc import Callable

from cascadevl.tasks.base import Task
from cascadevl.tasks.chains import Chains
from cascadevl.tasks.charts import Charts
from cascadevl.tasks.easy_vqa import EasyVQA
from cascadevl.tasks.existence import Existence
from cascadevl.tasks.grounding import Grounding
from cascadevl.tasks.handwriting import Handwriting
from cascadevl.tasks.letters import Letters
from cascadevl.tasks.needle import Needle
from cascadevl.tasks.printed import Printed
from cascadevl.tasks.shapes import Shapes
from cascadevl.tasks.subset_sum import SubsetSum
from cascadevl.tasks.text import Text

TASKS: dict[str, Callable[..., Task]] = {
    "chains": Chains,
    "charts": Charts,
    "easy_vqa": EasyVQA,
    "existence": Existence,
    "grounding": Grounding,
    "handwriting": Handwriting,
    "letters": Letters,
    "needle": Needle,
    "printed": Printed,
    "shapes": Shapes,
    "subset_sum": SubsetSum,
    "text": Text,
}
"""Every family by its name; call one with ``px=``, ``num_questions=`` and its own settings."""
