"""The processor: prompts, pictures and answers in the form transformers' users know.

It behaves as transformers' ``InternVLProcessor``, needs no torchvision, and is thin: pictures are
tiled and conversations rendered by the very code that training uses (`ExampleBuilder`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, Unpack, cast

import numpy as np
from jaxtyping import Int64
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from cascadevl.data.chat import (
    ChatMessage,
    Mode,
    as_text,
    image_of,
    jinja_template,
    to_messages,
)
from cascadevl.data.conversation import (
    CONTENT_TOKENS,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    End,
    Template,
    system_text,
    template_named,
)
from cascadevl.data.example import ExampleBuilder, ExampleConfig
from cascadevl.data.image import open_image
from cascadevl.data.inputs import Filling, Pictures, check_filling, model_inputs, pictures_of_texts
from cascadevl.data.processor_files import ProcessorSettings, read_settings, write_settings
from cascadevl.data.tiling import TilingConfig, limit_for, tile_image
from cascadevl.data.tools import Tools, with_tools
from cascadevl.errors import RequestError
from cascadevl.sequence import expand
from cascadevl.types import NO_PARENT, Example, ImageRef, Message

Conversation: TypeAlias = Sequence[ChatMessage]
"""Turns in our form or transformers'."""

Ids: TypeAlias = int | Sequence[int] | np.ndarray | Tensor
"""Token ids in any form ``generate`` or a tokenizer gives."""


class CascadeVLProcessor(ProcessorMixin):  # type: ignore[misc]  # transformers is not typed here
    """Turns pictures and text into model inputs, and generated ids into text.

    Two defaults of the public tools differ, and `system_message` decides between them: prompts of
    -HF repositories have no system turn unless a message brings one (``""``), official ``chat()``
    and all training writes the template's own (None). It is read from the checkpoint, and any
    call can choose another.

    Attributes:
        tokenizer: The tokenizer.
        settings: What it was made with.
        template: The conversation template.
        builder: Makes the examples; the same class that makes training's.
        chat_template: Jinja template by which plain transformers writes the same prompts.
        image_token: What stands for a picture in rendered text: ``<IMG_CONTEXT>``.
        image_token_id: Its id, also that of every visual token.
        hidden_ids: Special tokens that answers are written without.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "internvl2_5",
        system_message: str | None = None,
        tiling: TilingConfig | None = None,
        tokens_per_tile: int = 256,
        share_tiles: bool = True,
    ) -> None:
        """Bind a tokenizer to a template and a tiling.

        Args:
            tokenizer: Must know the image tokens and the template's control tokens.
            template: Key of `cascadevl.data.conversation.TEMPLATES`.
            system_message: None for the template's own, empty for no system turn.
            tiling: None for that of the released models.
            tokens_per_tile: Visual tokens of a full tile.
            share_tiles: Whether the pictures of one conversation share ``max_tiles``, as in
                training; False gives each of them all, as transformers does.

        Raises:
            ConfigError: If the template is unknown or a token is missing.
        """
        self.settings = ProcessorSettings(
            template=template,
            system_message=system_message,
            tiling=tiling if tiling is not None else TilingConfig(),
            tokens_per_tile=tokens_per_tile,
            share_tiles=share_tiles,
        )
        self.template: Template = template_named(template)
        config = ExampleConfig(
            template=template,
            system=system_message,
            tiling=self.settings.tiling,
            max_tokens=sys.maxsize,  # what is too long is for the model to say, not for its form
            share_tiles=share_tiles,
        )
        self.builder = ExampleBuilder(tokenizer, config, tokens_per_tile)
        self.image_token = IMAGE_CONTEXT
        self.image_token_id = self.builder.image_token_id
        system = self.template.system if system_message is None else system_message
        super().__init__(  # type: ignore[no-untyped-call]
            tokenizer, chat_template=jinja_template(self.template, system)
        )
        self.hidden_ids = frozenset(
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in CONTENT_TOKENS
        )

    def __repr__(self) -> str:
        """Show the settings."""
        return f"{type(self).__name__}({self.settings}, tokenizer={type(self.tokenizer).__name__})"

    @property
    def system_message(self) -> str | None:
        """System message of conversations that have none; None for the template's, or empty."""
        return self.settings.system_message

    @property
    def tiling(self) -> TilingConfig:
        """How pictures are cut."""
        return self.settings.tiling

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a full tile."""
        return self.settings.tokens_per_tile

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self,
        images: Pictures | None = None,
        text: str | Sequence[str] | None = None,
        *,
        max_patches: int | None = None,
        **filling: Unpack[Filling],
    ) -> BatchFeature:
        """Prepare rendered text and its pictures.

        Every ``<IMG_CONTEXT>`` of the text becomes ``<img>``, the visual tokens of its picture and
        ``</img>``. Texts are taken as written, control tokens included; nothing is ever cut.

        Args:
            images: Pictures in the order of the placeholders: flat, or one list a text.
            text: One prompt or several, as `apply_chat_template` renders them.
            max_patches: Most tiles of each picture, instead of the configured limit.
            **filling: See `Filling`.

        Returns:
            ``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values``.

        Raises:
            DataError: If pictures and placeholders differ in number or a picture is bad.
            RequestError: If a prompt is longer than ``max_length``.
        """
        if text is None:
            raise RequestError("no text is given; every picture needs its place in a text")
        texts = [text] if isinstance(text, str) else list(text)
        rows, tiles = [], []
        for prompt, pictures in zip(texts, pictures_of_texts(images, texts), strict=True):
            limits = self._limits(len(pictures), max_patches)
            refs = [ImageRef(image_of(picture, "the call")) for picture in pictures]
            cut = [tile_image(open_image(ref, source="the call"), limits) for ref in refs]
            slotted = prompt.replace(IMAGE_CONTEXT, f"{IMAGE_START}{IMAGE_CONTEXT}{IMAGE_END}")
            ids = np.asarray(self.tokenizer(slotted, verbose=False).input_ids, dtype=np.int64)
            rows.append(self._expanded(ids, [len(each) for each in cut]))
            tiles += cut
        return model_inputs(rows, tiles, self.tokenizer, filling)

    def prompt(
        self,
        messages: Conversation,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        force_thinking: bool = False,
        end: End = "prompt",
        tools: Tools | None = None,
    ) -> Example:
        """The example a model is to answer.

        Args:
            messages: The conversation, in our form or transformers'.
            system: Instead of `system_message`; empty for no system turn.
            thinking: True asks for reasoning through the system message.
            force_thinking: Also begin the answer so that the mode is certain.
            end: How the text ends.
            tools: What may be called; see `with_tools`.

        Raises:
            DataError: If a message or picture cannot be used.
            RequestError: If the template has no form for tools.
        """
        mode = Mode(system=system, thinking=thinking, force_thinking=force_thinking, end=end)
        return self.builder.prompt(self._messages(messages, tools, mode), **mode)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Conversation | Sequence[Conversation],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        system: str | None = None,
        thinking: bool | None = None,
        force_thinking: bool = False,
        tools: Tools | None = None,
        **filling: Unpack[Filling],
    ) -> Any:
        """Render a conversation, or several, and prepare the model inputs.

        Args:
            conversation: One conversation or a list of them; see `to_messages`.
            add_generation_prompt: End with the header of the answer to come.
            tokenize: False returns text, with ``<IMG_CONTEXT>`` in each picture's place; a picture
                may then be ``{"type": "image"}`` alone, and be given to the call later.
            return_dict: True returns a `BatchFeature`, False the ids alone.
            system: As in `prompt`, like the next two.
            thinking: True asks for reasoning.
            force_thinking: True makes sure of it, or of its absence.
            tools: What may be called; see `with_tools`.
            **filling: See `Filling`.

        Raises:
            DataError: If a message or picture cannot be used.
            RequestError: If a prompt is longer than ``max_length``, or the template has no form
                for tools.
        """
        check_filling(filling)
        is_batch = bool(conversation) and isinstance(conversation[0], Sequence)
        batch = cast(Sequence[Conversation], conversation if is_batch else [conversation])
        end: End = "prompt" if add_generation_prompt else "complete"
        mode = Mode(system=system, thinking=thinking, force_thinking=force_thinking, end=end)
        if not tokenize:
            texts = [self._text(turns, tools, mode) for turns in batch]
            return texts if is_batch else texts[0]
        examples = [self.prompt(turns, tools=tools, **mode) for turns in batch]
        feature = self.batch(examples, **filling)
        return feature if return_dict else feature["input_ids"]

    def batch(self, examples: Sequence[Example], **filling: Unpack[Filling]) -> BatchFeature:
        """Model inputs of examples, for ``generate``.

        Args:
            examples: From `prompt`.
            **filling: See `Filling`.

        Raises:
            RequestError: If a prompt is longer than ``max_length``.
        """
        return model_inputs(
            [self._expanded(each.input_ids, each.tiles_per_image) for each in examples],
            [each.tiles for each in examples if each.num_tiles],
            self.tokenizer,
            filling,
        )

    def _limits(self, num_images: int, max_tiles: int | None) -> TilingConfig:
        """Limits of each picture of a text."""
        if max_tiles is not None:
            fewest = min(self.tiling.min_tiles, max_tiles)
            return replace(self.tiling, max_tiles=max_tiles, min_tiles=fewest)
        return limit_for(num_images, self.tiling) if self.settings.share_tiles else self.tiling

    def _expanded(
        self, ids: Int64[np.ndarray, " slots"], tiles_per_image: Sequence[int]
    ) -> list[int]:
        """Ids with every slot repeated for the visual tokens of its picture."""
        expanded = expand(
            ids,
            np.zeros(len(ids), dtype=np.bool_),
            np.zeros(len(ids), dtype=np.int64),
            (NO_PARENT,),
            image_token_id=self.image_token_id,
            tokens_per_image=[tiles * self.tokens_per_tile for tiles in tiles_per_image],
            increments=[1.0] * len(tiles_per_image),
        )
        return cast(list[int], expanded.input_ids.tolist())

    def _messages(
        self, turns: Conversation, tools: Tools | None, mode: Mode, *, placeholders: bool = False
    ) -> tuple[Message, ...]:
        """The turns, the tools written into them."""
        messages = to_messages(turns, placeholders=placeholders, calls=bool(tools))
        if not tools:
            return messages
        system = self.system_message if mode["system"] is None else mode["system"]
        text = system_text(messages, self.template, system=system, thinking=mode["thinking"])
        return with_tools(messages, tools, self.template, text)

    def _text(self, turns: Conversation, tools: Tools | None, mode: Mode) -> str:
        messages = self._messages(turns, tools, mode, placeholders=True)
        if mode["system"] is None:
            mode = {**mode, "system": self.system_message}
        return as_text(messages, self.template, self.builder.control, mode)

    def decode(self, token_ids: Ids, skip_special_tokens: bool = False, **options: bool) -> str:
        """Text of ids.

        Args:
            token_ids: Ids of one answer or prompt.
            skip_special_tokens: Leave out control tokens and, where reasoning has a channel of its
                own, write it as ``<think>...</think>``. ``<ref>``, ``<box>`` and ``<quad>``
                belong to answers and stay, unlike in transformers.
            **options: Of the tokenizer's ``decode``.
        """
        if isinstance(token_ids, Tensor):
            token_ids = token_ids.tolist()
        ids = np.atleast_1d(np.asarray(token_ids, dtype=np.int64)).tolist()
        has_channels = self.template.reasoning is not None
        if skip_special_tokens and not has_channels:
            ids = [number for number in ids if number not in self.hidden_ids]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=False, **options))
        if skip_special_tokens and has_channels:
            return self.builder.control.sub("", self.template.read_answer(text))
        return text

    def batch_decode(
        self, sequences: Iterable[Ids] | Tensor, skip_special_tokens: bool = False, **options: bool
    ) -> list[str]:
        """Texts of several sequences of ids, one row an answer; arguments as in `decode`."""
        return [self.decode(ids, skip_special_tokens, **options) for ids in sequences]

    def stop_token_ids(self, config_eos: int | Sequence[int] | None = None) -> tuple[int, ...]:
        """Ids that end an answer.

        Args:
            config_eos: End-of-sequence ids of the checkpoint's configs. Some released InternVL3
                name only ``<|endoftext|>``, which never ends a turn: so they are added to the
                template's, not taken instead.
        """
        more = [config_eos] if isinstance(config_eos, int) else list(config_eos or ())
        return tuple(dict.fromkeys([*self.builder.stop_token_ids, *more]))

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> list[str]:  # type: ignore[override]
        """Write the processor files of a -HF repository, which plain transformers opens too.

        Args:
            save_directory: Folder; made if missing.
            **_: Options of transformers' Trainer that mean nothing here.

        Returns:
            The files.
        """
        files = write_settings(
            self.settings, self.tokenizer, str(self.chat_template), Path(save_directory)
        )
        return [str(file) for file in files]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **hub_options: Any,
    ) -> CascadeVLProcessor:
        """Read the processor of a checkpoint in the GitHub layout or the -HF layout.

        Args:
            pretrained_model_name_or_path: A folder, or the name of a repository.
            tokenizer: Instead of the checkpoint's own files (InternLM2 brings none that can be
                read without remote code).
            **hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            CheckpointError: If the files are missing or cannot be used.
            ConfigError: If the checkpoint's template is not known.
        """
        name = pretrained_model_name_or_path
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub_options)
        settings = read_settings(name, tokenizer, **hub_options)
        fields = {field.name: getattr(settings, field.name) for field in dataclass_fields(settings)}
        return cls(tokenizer, **fields)
