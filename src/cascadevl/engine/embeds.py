"""A prompt as embeddings: what is handed to a program that knows the language half only.

The engine keeps ids and visual tokens apart; transformers' `generate` and a vLLM server take one
row of embeddings, visual tokens in their places.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cascadevl.engine.prompts import Prompt, prepare, routed
from cascadevl.engine.requests import Request
from cascadevl.engine.vision import VisionCache


def prepared(request: Request, vision: VisionCache) -> Prompt:
    """The prompt of a request, routed.

    Args:
        request: What is asked.
        vision: Encodes its tiles, if a router must decide how many tokens they get.

    Raises:
        RequestError: If it does not fit the model.
    """
    prompt = prepare(request, vision.model.config)
    if prompt.unrouted is None:
        return prompt
    return routed(prompt.unrouted, vision.probabilities(prompt.unrouted.undecided))


@torch.inference_mode()
def embed(prompt: Prompt, vision: VisionCache) -> Float[Tensor, "tokens hidden"]:
    """Embeddings of a prompt in the type of the weights.

    Args:
        prompt: The prompt.
        vision: Makes its visual tokens; its model's table of token embeddings makes the others.
    """
    model = vision.model
    ids = torch.from_numpy(prompt.tokens.ids).to(model.device)
    embeds: Tensor = model.get_input_embeddings()(ids)
    if prompt.tiles:
        places = np.concatenate([np.arange(tile.start, tile.stop) for tile in prompt.tiles])
        visual = torch.cat(vision.features(prompt.tiles))
        index = torch.from_numpy(places).to(model.device)
        embeds = embeds.index_copy(0, index, visual.to(embeds))
    return embeds
