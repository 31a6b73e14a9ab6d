"""A vision tower and a language model joined into the checkpoint that pre-training starts from.

InternVL3 report, section 2.1: both halves come with weights of their own, the projector between
them is random. Tensors are copied bit for bit, shard by shard, without building the model. What is
new are the projector, drawn from a seed, and the rows of the tokens that the language model does
not have (docs/decisions/0020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cascadevl.data.conversation import IMAGE_CONTEXT
from cascadevl.data.parsing import VIDEO_MARK
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.tiling import TilingConfig
from cascadevl.errors import CheckpointError
from cascadevl.model.checkpoint import HEAD, config_object, expected_shapes
from cascadevl.model.checkpoint_names import Reader, Recipe, through
from cascadevl.model.config_files import Json, default_template, with_old_rope_keys
from cascadevl.model.configuration import CascadeVLConfig
from cascadevl.model.conversion import write_checkpoint
from cascadevl.model.halves import TOWER, Half, open_language, open_vision
from cascadevl.model.repository_files import generation_config, load_processor
from cascadevl.model.tensor_files import MAX_SHARD_BYTES, new_folder
from cascadevl.model.tokenizer_files import add_image_tokens, read_tokenizer
from cascadevl.model.zoo import config_for, released

EMBEDDING = "model.language_model.embed_tokens.weight"
PROJECTOR = "model.multi_modal_projector."

_ROWS_AT_ONCE = 4096  # of an embedding, in float64: 270 MB at the largest width
_FILE_KEYS = ("architectures", "dtype", "torch_dtype", "transformers_version", "drop_path_rate")
_SHAPE_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "norm_type", "attention_bias", "use_qk_norm"),
    *("image_size", "patch_size"),
)
_SIZE_GIVES = ("vocab_size", "max_position_embeddings", "rope_scaling", "tie_word_embeddings")


def join(
    vision: str | Path,
    language: str | Path,
    out: str | Path,
    *,
    size: str | None = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint of a vision tower, a random projector and a language model.

    ``out`` appears complete or not at all. The vision tower takes the type of the language model
    where the two differ; all other tensors are the sources', bit for bit, but for the rows of new
    tokens. How pictures are cut goes along from a multimodal ``vision``; otherwise it is as
    released.

    Args:
        vision: Folder of an InternViT, or of a checkpoint whose vision tower is taken.
        language: Folder of a text-only checkpoint.
        out: Folder to make; may exist if it is empty.
        size: Name of a released size (`cascadevl.model.zoo.ZOO`): the halves must have its
            shapes, and the result gets its rows of the embedding, its own output head, and its
            context. None takes all that from the language model.
        seed: Of the projector.
        max_shard_bytes: Largest size of a file of weights.

    Raises:
        CheckpointError: If a folder is not what it should be, the halves do not fit their
            configurations or the size, or the target exists.
        ConfigError: If there is no such size, or the tokenizer lacks what the template needs.
    """
    tower, body = open_vision(Path(vision)), open_language(Path(language))
    tokenizer = read_tokenizer(body.path)
    known = rows_needed(tokenizer)
    new = add_image_tokens(tokenizer)
    config = _config(tower, body, tokenizer)
    shapes = _check(tower, body, config)
    if size is not None:
        _take_size(size, config, tower, body)
    text = config["text_config"]
    text["vocab_size"] = _rows(rows_needed(tokenizer), text["vocab_size"], size, body.path)
    final = _object(config, tower, body)
    processor = _processor(final, tokenizer)
    drawn = draw_projector(
        {name: shape for name, shape in shapes.items() if name.startswith(PROJECTOR)},
        std=float(text.get("initializer_range", 0.02)),
        dtype=body.outline(EMBEDDING).dtype,
        seed=seed,
    )
    grow = partial(grown, num_rows=text["vocab_size"], known=known, new=new)
    recipes = _recipes(tower, body, drawn, grow, tied=config["tie_word_embeddings"])
    with new_folder(Path(out)) as folder:
        write_checkpoint(
            folder,
            names=recipes,
            read=through(_reader(tower.read, body.read, drawn.__getitem__), recipes),
            outline=through(
                _reader(tower.outline, body.outline, lambda name: drawn[name].to("meta")), recipes
            ),
            config=config,
            processor=processor,
            generation=generation_config(body.path, processor, final),
            layout="hf",
            max_shard_bytes=max_shard_bytes,
        )


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of an embedding that a tokenizer can ask for.

    ``<video>`` is not counted: it never reaches the model, and released embeddings have no row for
    it.
    """
    vocab = tokenizer.get_vocab()
    return 1 + max(number for token, number in vocab.items() if token != VIDEO_MARK)


def grown(
    table: Float[Tensor, "rows width"], *, num_rows: int, known: int, new: tuple[int, ...]
) -> Float[Tensor, "new_rows width"]:
    """An embedding or an output head with rows for new tokens: the mean of those of known tokens.

    Rows past those of the known tokens were never trained, whether they are there or not.

    Args:
        table: The table; on the ``meta`` device only its shape is worked out.
        num_rows: Rows wanted; fewer than there are cuts unused ones.
        known: Tokens that the table was trained with.
        new: Ids of the new tokens.
    """
    old = min(len(table), num_rows)
    if old == num_rows == len(table) and not new:
        return table
    result = table.new_empty(num_rows, table.shape[1])
    if table.is_meta:
        return result
    trained = table[: min(known, len(table))]
    total = torch.zeros(table.shape[1], dtype=torch.float64)
    for part in trained.split(_ROWS_AT_ONCE):
        total += part.double().sum(dim=0)
    mean = (total / len(trained)).to(table.dtype)
    result[:old] = table[:old]
    result[old:] = mean
    result[list(new)] = mean
    return result


def draw_projector(
    shapes: Mapping[str, tuple[int, ...]], *, std: float, dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """A projector with random weights, as transformers draws them.

    Args:
        shapes: Of its tensors, by name.
        std: Standard deviation of the weights; biases are zero, the norm is the identity.
        dtype: Type of the tensors; drawn in float32, so that it does not change the draw.
        seed: Seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name in sorted(shapes):
        tensor = torch.zeros(shapes[name])
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        elif name.endswith("weight"):
            tensor.normal_(std=std, generator=generator)
        drawn[name] = tensor.to(dtype)
    return drawn


def _config(tower: Half, body: Half, tokenizer: PreTrainedTokenizerBase) -> Json:
    """The configuration that the two folders add up to, in the -HF form."""
    tied = HEAD not in body.recipes
    text = {k: v for k, v in with_old_rope_keys(body.config).items() if k not in _FILE_KEYS}
    vision = {k: v for k, v in tower.config.items() if k not in _FILE_KEYS}
    tiling = load_processor(tower.path).settings.tiling if tower.whole else TilingConfig()
    config: Json = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        "text_config": {**text, "tie_word_embeddings": tied},
        "vision_config": vision,
        "template": default_template(text),
        "system_message": None,
        "ps_version": "v2",
        "trained_context": text.get("max_position_embeddings"),
        "min_tiles": tiling.min_tiles if tiling.dynamic else 1,
        "max_tiles": tiling.max_tiles if tiling.dynamic else 1,
        "use_thumbnail": tiling.thumbnail and tiling.dynamic,
        "drop_path_rate": tower.config["drop_path_rate"],
        "dtype": str(body.outline(EMBEDDING).dtype).removeprefix("torch."),
    }
    return {**config, "image_seq_length": _object(config, tower, body).tokens_per_tile}


def _object(config: Json, tower: Half, body: Half) -> CascadeVLConfig:
    place = f"{tower.path} and {body.path}, config.json"
    return config_object(config, place, tied=config["tie_word_embeddings"])


def _check(tower: Half, body: Half, config: Json) -> dict[str, tuple[int, ...]]:
    """Hold both halves' tensors against their configurations; the shapes of the whole."""
    shapes = expected_shapes(_object(config, tower, body))
    left_out = (TOWER, PROJECTOR, *([HEAD] if config["tie_word_embeddings"] else []))
    tower.check({name: shape for name, shape in shapes.items() if name.startswith(TOWER)})
    body.check({name: shape for name, shape in shapes.items() if not name.startswith(left_out)})
    return shapes


def _take_size(size: str, config: Json, tower: Half, body: Half) -> None:
    """Hold the halves against a released size, and take over what it says beyond its halves."""
    model, shape = released(size), config_for(size)
    ours = _object(config, tower, body)
    for half, wanted, found in (
        (tower, shape.vision_config.to_dict(), ours.vision_config.to_dict()),
        (body, model.text, ours.text_config.to_dict()),
    ):
        other = [
            f"{key} is {found[key]} but should be {value}"
            for key, value in wanted.items()
            if key in _SHAPE_KEYS and key in found and found[key] != value
        ]
        if other:
            raise CheckpointError(
                f"{half.path} is not the half of {model.name}: {'; '.join(other)}"
            )
    text = config["text_config"]
    text |= {key: model.text[key] for key in _SIZE_GIVES if key in model.text}
    config |= {"tie_word_embeddings": text["tie_word_embeddings"]}
    config |= {"trained_context": text["max_position_embeddings"]}


def _rows(needed: int, given: int, size: str | None, path: Path) -> int:
    """Rows of the embedding: no fewer than the language model has, or those of a size."""
    if size is not None and needed > given:
        raise CheckpointError(
            f"{path}: its tokenizer with the image tokens needs {needed} rows of the embedding, "
            f"but {released(size).name} has {given}; leave the size out"
        )
    return max(needed, given)


def _processor(config: CascadeVLConfig, tokenizer: PreTrainedTokenizerBase) -> CascadeVLProcessor:
    return CascadeVLProcessor(
        tokenizer,
        template=config.template,
        tiling=TilingConfig(
            tile_px=config.tile_px,
            min_tiles=config.min_tiles,
            max_tiles=config.max_tiles,
            thumbnail=config.use_thumbnail,
        ),
        tokens_per_tile=config.tokens_per_tile,
    )


def _recipes(
    tower: Half, body: Half, drawn: Mapping[str, Tensor], grow: Callable[..., Tensor], *, tied: bool
) -> dict[str, Recipe]:
    """How each tensor is made of those of the halves and of the projector."""
    cast = partial(_of_type, dtype=body.outline(EMBEDDING).dtype)
    recipes = {name: Recipe((name,), cast) for name in tower.recipes}
    recipes |= {name: Recipe((name,), _same) for name in (*drawn, *body.recipes)}
    recipes[EMBEDDING] = Recipe((EMBEDDING,), grow)
    if not tied:  # the head of a released size begins as a copy where the tables were one
        recipes[HEAD] = Recipe((HEAD if HEAD in body.recipes else EMBEDDING,), grow)
    return recipes


def _reader(tower: Reader, body: Reader, drawn: Reader) -> Reader:
    def read(name: str) -> Tensor:
        if name.startswith(PROJECTOR):
            return drawn(name)
        return (tower if name.startswith(TOWER) else body)(name)

    return read


def _of_type(tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype)


def _same(tensor: Tensor) -> Tensor:
    return tensor
