"""What is special about InternLM: its fused attention projection and its tokenizer.

InternVL2.5-8B and InternVL3-9B come with code of their own for both in the repository. Nothing
from outside is run here. As a network InternLM2 is Llama with other names and with queries, keys
and values in one interleaved tensor; its tokenizer is a sentencepiece model, which is turned into
the same byte-pair encoding and held against sentencepiece itself by the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import Tensor

from cascadevl.errors import CheckpointError

# Types of pieces in a sentencepiece model (sentencepiece_model.proto).
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedAttention:
    """How InternLM2 interleaves queries, keys and values in ``wqkv``.

    Its rows are ``(h gs d)``: for each key-value head first the queries of its group, then its
    key, then its value.

    Attributes:
        num_key_value_heads: ``h``.
        num_groups: Queries a key-value head, ``gs - 2``.
    """

    num_key_value_heads: int
    num_groups: int


def split_wqkv(
    wqkv: Shaped[Tensor, "rows ..."], part: Literal["q", "k", "v"], fused: FusedAttention
) -> Shaped[Tensor, "part_rows ..."]:
    """The queries, keys or values of InternLM2's fused projection, as Llama holds them."""
    rest = wqkv.shape[1:]
    grouped = wqkv.reshape(fused.num_key_value_heads, fused.num_groups + 2, -1, *rest)
    last = {"k": -2, "v": -1}
    chosen = grouped[:, : fused.num_groups] if part == "q" else grouped[:, last[part]]
    return chosen.reshape(-1, *rest).clone()


def join_wqkv(
    q: Shaped[Tensor, "query_rows ..."],
    k: Shaped[Tensor, "kv_rows ..."],
    v: Shaped[Tensor, "kv_rows ..."],
    fused: FusedAttention,
) -> Shaped[Tensor, "rows ..."]:
    """InternLM2's fused projection from separate queries, keys and values."""
    heads, rest = fused.num_key_value_heads, q.shape[1:]
    parts = (
        q.reshape(heads, fused.num_groups, -1, *rest),
        k.reshape(heads, 1, -1, *rest),
        v.reshape(heads, 1, -1, *rest),
    )
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def convert_sentencepiece(file: Path) -> Tokenizer:
    """The byte-pair encoding of a sentencepiece model, with the same ids.

    Args:
        file: A ``tokenizer.model`` of type BPE.

    Raises:
        CheckpointError: If sentencepiece is not installed, or the model is of another type.
    """
    model = _read_model(file)
    pieces = list(model.pieces)
    vocab = {piece.piece: number for number, piece in enumerate(pieces)}
    unknown = next(piece.piece for piece in pieces if piece.type == _UNKNOWN)
    tokenizer = Tokenizer(
        BPE(
            vocab,
            _merges(pieces, vocab),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = _normaliser(model.normalizer_spec)
    tokenizer.decoder = _decoder(starts_with_space=model.normalizer_spec.add_dummy_prefix)
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in pieces
            if piece.type in (_UNKNOWN, _CONTROL)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=False)
            for piece in pieces
            if piece.type == _USER_DEFINED
        ]
    )
    return tokenizer


def _read_model(file: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ImportError as error:
        raise CheckpointError(
            f"{file}: reading a sentencepiece model needs the extra 'internlm': "
            "pip install 'cascadevl[internlm]'"
        ) from error
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    model = schema.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{file}: not a sentencepiece model ({error})") from error
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise CheckpointError(f"{file}: a sentencepiece model of another type than BPE")
    return model


def _merges(pieces: list[Any], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way a piece is made of two others, in the order in which sentencepiece merges."""
    found = []
    for number, piece in enumerate(pieces):
        text = piece.piece
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                found.append((-piece.score, number, vocab[left], vocab[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _normaliser(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _decoder(*, starts_with_space: bool) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if starts_with_space:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
