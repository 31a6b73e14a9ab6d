# %% [markdown]
# # Fewer visual tokens: full and compressed tiles in one prompt
#
# Every tile of a picture costs the same number of visual tokens, whatever it shows. A Flash model
# (InternVL3.5-Flash) has a second projector that makes a quarter as many, and a router that says
# for each tile how probable it is that the answer does not suffer. There is nothing to download
# here, so a tiny model with random weights stands for a released one: its router is as good as
# dice, but it decides, and everything behind it is as it will be.

# %%
import numpy as np
import PIL.Image
import torch

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig, normalise
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.engine.engine import Engine
from cascadevl.engine.requests import EngineConfig, Request
from cascadevl.engine.sampling import SamplingParams
from cascadevl.model.flash import add_flash
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import initialise, nano_config
from cascadevl.model.routing import KeepShare, Thresholds, VisualBudget, calibrated
from cascadevl.types import ImageRef, Message

# %% [markdown]
# ## A model with a router
#
# `add_flash` gives a plain model the second projector and the router, to be trained. At 112 px a
# full tile is 16 visual tokens and a compressed one 4; at 448 px it is 256 and 64.

# %%
tokenizer = build_tokenizer(["What is written on this page? The total is 42."], 400)
config = nano_config(
    len(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
)
model = CascadeVLForConditionalGeneration(config).eval()
initialise(model, seed=0)
add_flash(model, seed=0)
processor = CascadeVLProcessor(
    tokenizer,
    system_message="",
    tiling=TilingConfig(tile_px=112, max_tiles=6),
    tokens_per_tile=config.tokens_per_tile,
)
print(f"a tile is {config.tokens_per_tile} or {config.compressed_tokens} visual tokens")

# %% [markdown]
# ## What the router thinks
#
# `encode_images` gives what does not depend on a question: patch features and one probability a
# tile. The thumbnail is a tile like the others.

# %%
noise = np.random.default_rng(0).integers(0, 256, (224, 336, 3), dtype=np.uint8)
noise[:, 112:224] = 255  # white in the middle
question = [
    Message.of("user", ImageRef(PIL.Image.fromarray(noise)), "\nWhat is written on this page?")
]
example = processor.prompt(question)
with torch.no_grad():
    features = model.encode_images(normalise(example.tiles))
assert features.compress is not None
chances = features.compress.tolist()
print("probability of compressing:", " ".join(f"{chance:.4f}" for chance in chances))

# %% [markdown]
# ## Budgets
#
# A budget belongs to a request. The engine encodes the picture once for all of them, and of its
# two white tiles only one, because they are equal.

# %%
engine = Engine(model, processor, EngineConfig(num_pages=200))
budgets: dict[str, VisualBudget] = {
    "full": "full",
    "compressed": "compressed",
    "half of the tiles": KeepShare(0.5),
    "as released": Thresholds(absolute=0.0, relative=0.5),
    "calibrated to half": calibrated(chances, 0.5),
}
wish = SamplingParams(max_tokens=4)
for name, budget in budgets.items():
    request = Request(prompt=example, sampling=wish, visual_budget=budget)
    ((answer,),) = engine.generate([request])
    usage = answer.usage
    print(
        f"{name:<20}{answer.tokens_per_tile} {usage.compressed_tiles} of {usage.tiles} tiles "
        f"compressed, {usage.visual_tokens} visual tokens"
    )
assert engine.stats().encoded_tiles == len(chances) - 1

# %% [markdown]
# With every tile kept it is the model it was. On the command line the same wish is
# `cascadevl generate questions.jsonl answers.jsonl --model DIR --visual-budget 50%`.
