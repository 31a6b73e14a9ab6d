# %% [markdown]
# # A checkpoint: saved, converted, opened, asked
#
# Released InternVL models come in three layouts: that of the original repositories ("GitHub"), and
# two generations of transformers' -HF layout. `cascadevl.load` opens all of them. There is
# nothing to download here, so a tiny model with random weights stands for a released one.

# %%
import tempfile
from pathlib import Path

import PIL.Image
import torch
from transformers import InternVLForConditionalGeneration

import cascadevl
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.engine.conversation import answer
from cascadevl.model.conversion import convert
from cascadevl.model.loading import save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import initialise, nano_config

# %% [markdown]
# ## A model of its own

# %%
tokenizer = build_tokenizer(["What is in this picture? A cat, a dog, a bird."], 400)
config = nano_config(
    len(tokenizer),
    image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    vision_config={"num_hidden_layers": 2},
    text_config={"num_hidden_layers": 2},
)
model = CascadeVLForConditionalGeneration(config)
initialise(model, seed=0)
processor = CascadeVLProcessor(
    tokenizer,
    system_message="",
    tiling=TilingConfig(tile_px=112, max_tiles=6),
    tokens_per_tile=config.tokens_per_tile,
)

folder = Path(tempfile.mkdtemp(prefix="cascadevl-"))
save(model, processor, folder / "hf")
print(sorted(file.name for file in (folder / "hf").iterdir()))

# %% [markdown]
# ## There and back
#
# `convert` works on the tensors of the files, shard by shard, and never builds the model, so a
# large one needs little memory. The way back gives the same bytes. On the command line:
# `cascadevl convert SRC DST --to github`.

# %%
convert(folder / "hf", folder / "github", layout="github")
convert(folder / "github", folder / "back", layout="hf")
weights = "model.safetensors"
assert (folder / "hf" / weights).read_bytes() == (folder / "back" / weights).read_bytes()

# %% [markdown]
# ## Asked as transformers' models are
#
# The processor renders the conversation, cuts the picture and expands its placeholder. Random
# weights say nothing of sense, but they say the same in every layout.

# %%
picture = PIL.Image.new("RGB", (300, 200), "teal")
question = {"type": "text", "text": "What is in this picture?"}
messages = [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]
said = []
for layout in ("hf", "github"):
    model, processor = cascadevl.load(folder / layout)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=True)
    said.append(processor.decode(output[0, inputs["input_ids"].shape[1] :]))
    print(f"{layout:<7} {tuple(inputs['pixel_values'].shape)} {said[-1]!r}")
assert said[0] == said[1]

# %% [markdown]
# ## In plain transformers
#
# Our own checkpoints are -HF checkpoints with a few more keys: transformers opens them and
# computes the same logits.

# %%
plain = InternVLForConditionalGeneration.from_pretrained(folder / "hf")
with torch.no_grad():
    torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-4)

# %% [markdown]
# ## Many questions at once
#
# `answer` batches prompts and encodes a picture that several of them show only once.

# %%
prompts = [
    [{"role": "user", "content": [messages[0]["content"][0], {"type": "text", "text": text}]}]
    for text in ("A cat?", "A dog?", "A bird?")
]
for one in answer(model, processor, prompts, max_new_tokens=4, temperature=1.0, seed=0):
    print(f"{one.text!r} ({one.finish_reason})")
