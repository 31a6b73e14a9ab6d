# %% [markdown]
# # Where tokens sit: variable visual position encoding (V2PE)
#
# A rotary position tells a language model how far two tokens are apart. With one position a
# token, a picture of 13 tiles takes 3,328 positions, more than most texts. V2PE (InternVL3 report,
# section 2.1) lets a visual token move the position by less than 1: by its image's *increment*,
# one of 1, 1/2, 1/4, ..., 1/256. Text moves it by 1 as ever.

# %%
import numpy as np

from cascadevl.sequence import expand
from cascadevl.types import NO_PARENT

# %% [markdown]
# ## By hand
#
# Four tokens of text, a picture of four visual tokens, three tokens of text. The first token sits
# at 0; every later one moves forward by its own step.

# %%
words = ["Look", ":", "<img>", *["(visual)"] * 4, "</img>", "What", "?"]


def positions_by_hand(increment: float) -> list[float]:
    """Equations 1 and 2 of the report, as a loop."""
    positions = [0.0]
    for word in words[1:]:
        positions.append(positions[-1] + (increment if word == "(visual)" else 1.0))
    return positions


# %% [markdown]
# ## By the package
#
# In an example each picture is one slot. `expand` repeats the slot once a visual token and places
# all tokens. Training and inference call this same function.

# %%
SLOT = 7
ids = np.array([1, 2, 3, SLOT, 4, 5, 6])


def positions_of_package(increment: float, *, ceil_after_image: bool = False) -> list[float]:
    """The same, by `cascadevl.sequence.expand`."""
    expanded = expand(
        ids,
        np.zeros(len(ids), dtype=np.bool_),  # nothing trained, as at inference
        np.zeros(len(ids), dtype=np.int64),  # one segment
        (NO_PARENT,),  # which continues nothing
        image_token_id=SLOT,
        tokens_per_image=[4],
        increments=[increment],
        ceil_after_image=ceil_after_image,
    )
    return [float(position) for position in expanded.position_ids]


# %%
increments = (1.0, 0.5, 0.25)
print(f"{'token':<10}" + "".join(f"{f'increment {each:g}':>16}" for each in increments))
for number, word in enumerate(words):
    row = [positions_of_package(increment)[number] for increment in increments]
    print(f"{word:<10}" + "".join(f"{position:>16g}" for position in row))
for increment in increments:
    assert positions_of_package(increment) == positions_by_hand(increment)

# %% [markdown]
# With increment 1 these are the whole numbers 0, 1, 2, ...: released InternVL3 and InternVL3.5
# weights use that, and nothing changes for them.
#
# ## After a picture
#
# With other increments text may sit at a fraction. The public V2PE code rounds up after each
# picture; the report does not. `ceil_after_image` is there for weights trained that way
# (docs/decisions/0003). Both agree where a tile's increments add up to a whole number.

# %%
print("as printed:    ", positions_of_package(1 / 8)[-4:])
print("rounded up:    ", positions_of_package(1 / 8, ceil_after_image=True)[-4:])
assert positions_of_package(1 / 8)[-1] == 5.5
assert positions_of_package(1 / 8, ceil_after_image=True)[-1] == 6.0

# %% [markdown]
# ## Several answers from one beginning
#
# A segment can continue another one. Here two questions (segments 1 and 2) continue the same
# picture (segment 0), so both go on where the picture ends. The picture is encoded once.

# %%
ids = np.array([3, SLOT, 4, 10, 11, 20, 21, 22])
branched = expand(
    ids,
    np.zeros(len(ids), dtype=np.bool_),
    np.array([0, 0, 0, 1, 1, 2, 2, 2]),
    (NO_PARENT, 0, 0),
    image_token_id=SLOT,
    tokens_per_image=[4],
    increments=[0.25],
)
for segment in range(3):
    own = branched.position_ids[branched.segments == segment]
    print(f"segment {segment}: {[float(position) for position in own]}")
first = [float(branched.position_ids[branched.segments == segment][0]) for segment in (1, 2)]
assert first == [3.0, 3.0]

# %% [markdown]
# ## Why float32
#
# Increments are powers of two, so float32 holds their sums exactly up to 65,536. bfloat16 has
# eight bits for them: beyond 256 it cannot even tell whole positions apart.

# %%
assert np.float32(40_000) + np.float32(1 / 256) > np.float32(40_000)
