# %% [markdown]
# # From records to training steps
#
# Two pictures with two questions each and a text become two packed rows, one `Batch`, and a loss
# that falls. The pieces are those of `cascadevl train`; only the loop is written out here.

# %%
import PIL.Image
import torch

from cascadevl.data.collate import collate
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.packing import Packer, size_of
from cascadevl.data.spans import describe
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.losses.next_token import next_token_loss, token_nll
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import initialise, nano_config
from cascadevl.types import ImageRef, Message, Record

# %% [markdown]
# ## Records
#
# A record's `messages` are what its branches have in common, here the picture. A branch that
# begins with the role of the last message continues that turn.


# %%
def about(color: str) -> Record:
    """Two questions about a picture of one color."""
    picture = ImageRef(PIL.Image.new("RGB", (112, 112), color))
    answers = {"What color is it?": color, "Is it red?": "yes" if color == "red" else "no"}
    branches = tuple(
        (Message.of("user", f"\n{question}"), Message.of("assistant", answer))
        for question, answer in answers.items()
    )
    messages = (Message.of("user", picture),)
    return Record(source=color, record_id=color, messages=messages, branches=branches)


hello = (Message.of("user", "Who are you?"), Message.of("assistant", "a small model"))
records = [about("red"), about("blue"), Record(source="text", record_id="text", messages=hello)]

# %% [markdown]
# ## Tokenizer and model
#
# A tokenizer made of the words that occur, and a model of the InternVL architecture with random
# weights. One tile of 112 px becomes 16 visual tokens.

# %%
words = ["What color is it? Is it red? Who are you? a small model red blue yes no"]
tokenizer = build_tokenizer(words, 400)
image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
shape = nano_config(
    len(tokenizer),
    image_token_id=image_token_id,
    vision_config={"num_hidden_layers": 2},
    text_config={"num_hidden_layers": 2},
)
model = CascadeVLForConditionalGeneration(shape)
initialise(model, seed=0)
print(f"{sum(weight.numel() for weight in model.parameters()):,} weights")

# %% [markdown]
# ## Examples
#
# `describe` shows an example as the model will see it. Only answers and the token that ends them
# are trained (SFT). Segments 1 and 2 both continue segment 0.

# %%
config = ExampleConfig(system="", tiling=TilingConfig(tile_px=112, max_tiles=1), max_tokens=256)
builder = ExampleBuilder(tokenizer, config, shape.tokens_per_tile)
examples = [builder(record) for record in records]
for span in describe(examples[0], tokenizer):
    print(f"segment {span.segment}, {'trained' if span.trained else 'given  '}: {span.text!r}")

# %% [markdown]
# ## Packing
#
# Rows hold at most 80 tokens and 4 tiles here. A sample joins the open row that it fills best.

# %%
packer = Packer(max_tokens=80, max_tiles=4)
rows = []
for position, example in enumerate(examples):
    rows += packer.add(example, size_of(example, shape.tokens_per_tile), position)
rows += packer.flush()
for row in rows:
    print(f"a row of {len(row.items)} samples: {row.tokens} tokens, {row.tiles} tiles")

# %% [markdown]
# ## The batch
#
# Slots are expanded, tokens placed, and every target knows the hidden state that predicts it and
# its weight. With square averaging a target of a sample of *l* targets weighs 1 / sqrt(l).

# %%
batch = collate(
    [row.items for row in rows],
    image_token_id=image_token_id,
    pad_token_id=tokenizer.pad_token_id,
    tokens_per_tile=shape.tokens_per_tile,
    averaging="square",
)
print(
    f"ids {tuple(batch.input_ids.shape)}, {batch.num_tiles} tiles, {len(batch.target_ids)} targets"
)

# %% [markdown]
# ## Steps
#
# The model computes logits only where a target is, in chunks, and hands each chunk to the given
# function. The weights are normalised once, by their sum over the whole step
# (docs/decisions/0002); here a step is one batch.

# %%
torch.manual_seed(0)
optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
weight_sum = float(batch.target_weights.sum())
losses = []
for step in range(12):
    nll = model(
        batch=batch, head_fn=lambda logits, where: token_nll(logits, batch.target_ids[where])
    )
    loss = next_token_loss(nll, batch.target_weights, weight_sum)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    losses.append(loss.item())
    if step % 3 == 2:
        print(f"step {step + 1:2d}: loss {losses[-1]:.3f}")
assert losses[-1] < losses[0] / 2

# %% [markdown]
# `train/sft.py` is this with what a run needs besides: mixtures, schedules, float32 masters of
# bfloat16 weights, checkpoints that resume exactly, several processes.
