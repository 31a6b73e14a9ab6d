"""Every released size of InternVL3 and InternVL3.5: what it is made of, and how it is built.

The values are those of the released vision encoders and language models. `config_for` gives a
configuration, so that any size can be built, counted or planned for without a download; `load`
takes everything, token ids included, from a checkpoint's own files.

The counts beside them are those of the reports (InternVL3, table 1; InternVL3.5, table 1): all
experts, and the token embedding and the output head each on their own, as the files hold them,
even where the language model started from shares one table (InternVL3.5-1B, -2B and -4B are 1.06,
2.35 and 4.73 billion so, against 0.91, 2.04 and 4.34 with one table). Three rows differ:

- InternVL3-2B, 1.9 in the table, is 2.09 so, and 1.86 with one table for both.
- InternVL3-8B, 8.1 in the table, is 7.94 (InternViT-300M 0.30, projector 0.03, Qwen2.5-7B 7.61).
- InternVL3-9B, 9.2 in the table, is 9.14 (0.30, 0.03, InternLM3-8B 8.80).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

from cascadevl.errors import ConfigError
from cascadevl.model.configuration import CascadeVLConfig

VisionName: TypeAlias = Literal["InternViT-300M", "InternViT-6B"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedModel:
    """One size of the family.

    Attributes:
        name: Name in the reports.
        hub_id: Repository in the GitHub format, after the last stage of training.
        suffixes: Further repositories: what follows ``hub_id`` in their names. ``-HF`` and
            ``-hf`` mark the -HF format; the other names are stages and can be had in it too.
        vision: The vision encoder.
        language: The language model it was trained from.
        text: Shape of the language model, as its config.json has it.
        image_token_id: Id of ``<IMG_CONTEXT>`` in the released tokenizer.
        template: Conversation template.
        report_billion: Parameters as the report's table has them, in billions; None where it does
            not say, as of the Flash models.
        active_billion: Parameters used for a token, in billions, where the report gives them.
        flash: Whether it has a second projector and a router (InternVL3.5-Flash).
    """

    name: str
    hub_id: str
    suffixes: tuple[str, ...]
    vision: VisionName
    language: str
    text: dict[str, Any]
    image_token_id: int
    template: str = "internvl2_5"
    report_billion: float | None
    active_billion: float | None = None
    flash: bool = False

    @property
    def preset(self) -> str | None:
        """What its runs are called, ``configs/STAGE_PRESET.yaml``; None if there are none."""
        if not self.name.startswith("InternVL3") or self.flash:
            return None
        return self.name.lower().removeprefix("internvl3.5-")


_VISION: dict[VisionName, dict[str, Any]] = {
    "InternViT-300M": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "norm_type": "layer_norm",
        "attention_bias": True,
        "use_qk_norm": False,
    },
    "InternViT-6B": {
        "hidden_size": 3200,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
        "norm_type": "rms_norm",
        "attention_bias": False,
        "use_qk_norm": True,
    },
}


def _body(
    model_type: str, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen2(*shape: int) -> dict[str, Any]:
    rope = {"rope_type": "dynamic", "factor": 2.0}
    return _body(
        "qwen2", *shape, vocab_size=151674, max_position_embeddings=32768, rope_scaling=rope
    )


def _qwen3(*shape: int) -> dict[str, Any]:
    return _body("qwen3", *shape, head_dim=128, vocab_size=151936, max_position_embeddings=40960)


def _qwen3_moe(*shape: int, expert_mlp: int) -> dict[str, Any]:
    return _body(
        "qwen3_moe",
        *shape,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=expert_mlp,
        norm_topk_prob=True,
    )


def _internlm(*shape: int, vocab_size: int, rope_theta: float) -> dict[str, Any]:
    return _body(
        "llama",
        *shape,
        vocab_size=vocab_size,
        rope_theta=rope_theta,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0},
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        attention_bias=False,
    )


_GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "sliding_window": 128,
    "rope_theta": 150_000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "tie_word_embeddings": False,
}


def _internvl3(
    size: str,
    language: str,
    text: dict[str, Any],
    report_billion: float,
    vision: VisionName = "InternViT-300M",
    image_token_id: int = 151667,
) -> ReleasedModel:
    return ReleasedModel(
        name=f"InternVL3-{size}",
        hub_id=f"OpenGVLab/InternVL3-{size}",
        suffixes=("-Pretrained", "-Instruct", "-hf"),
        vision=vision,
        language=language,
        text=text,
        image_token_id=image_token_id,
        report_billion=report_billion,
    )


def _internvl3_5(
    size: str,
    language: str,
    text: dict[str, Any],
    report_billion: float,
    vision: VisionName = "InternViT-300M",
    *,
    active_billion: float | None = None,
) -> ReleasedModel:
    return ReleasedModel(
        name=f"InternVL3.5-{size}",
        hub_id=f"OpenGVLab/InternVL3_5-{size}",
        suffixes=("-Pretrained", "-Instruct", "-MPO", "-HF"),
        vision=vision,
        language=language,
        text=text,
        image_token_id=151671,
        report_billion=report_billion,
        active_billion=active_billion,
    )


_MODELS = (
    _internvl3("1B", "Qwen2.5-0.5B", _qwen2(896, 24, 14, 2, 4864), 0.9),
    _internvl3("2B", "Qwen2.5-1.5B", _qwen2(1536, 28, 12, 2, 8960), 1.9),
    _internvl3("8B", "Qwen2.5-7B", _qwen2(3584, 28, 28, 4, 18944), 8.1),
    _internvl3(
        "9B",
        "InternLM3-8B",
        _internlm(4096, 48, 32, 2, 10240, vocab_size=128512, rope_theta=50_000_000.0),
        9.2,
        image_token_id=128505,
    ),
    _internvl3("14B", "Qwen2.5-14B", _qwen2(5120, 48, 40, 8, 13824), 15.1),
    _internvl3("38B", "Qwen2.5-32B", _qwen2(5120, 64, 40, 8, 27648), 38.4, "InternViT-6B"),
    _internvl3("78B", "Qwen2.5-72B", _qwen2(8192, 80, 64, 8, 29568), 78.4, "InternViT-6B"),
    _internvl3_5("1B", "Qwen3-0.6B", _qwen3(1024, 28, 16, 8, 3072), 1.1),
    _internvl3_5("2B", "Qwen3-1.7B", _qwen3(2048, 28, 16, 8, 6144), 2.3),
    _internvl3_5("4B", "Qwen3-4B", _qwen3(2560, 36, 32, 8, 9728), 4.7),
    _internvl3_5("8B", "Qwen3-8B", _qwen3(4096, 36, 32, 8, 12288), 8.5),
    _internvl3_5("14B", "Qwen3-14B", _qwen3(5120, 40, 40, 8, 17408), 15.1),
    _internvl3_5("38B", "Qwen3-32B", _qwen3(5120, 64, 64, 8, 25600), 38.4, "InternViT-6B"),
    _internvl3_5(
        "30B-A3B",
        "Qwen3-30B-A3B",
        _qwen3_moe(2048, 48, 32, 4, 6144, expert_mlp=768),
        30.8,
        active_billion=3.0,
    ),
    _internvl3_5(
        "241B-A28B",
        "Qwen3-235B-A22B",
        _qwen3_moe(4096, 94, 64, 4, 12288, expert_mlp=1536),
        240.7,
        "InternViT-6B",
        active_billion=28.0,
    ),
    ReleasedModel(
        name="InternVL3.5-20B-A4B",
        hub_id="OpenGVLab/InternVL3_5-GPT-OSS-20B-A4B-Preview",
        suffixes=("-HF",),
        vision="InternViT-300M",
        language="GPT-OSS-20B",
        text=_GPT_OSS_20B,
        image_token_id=200021,
        template="internvl3_5_gpt_oss",
        report_billion=21.2,
        active_billion=4.0,
    ),
    ReleasedModel(
        name="InternVL2.5-8B",
        hub_id="OpenGVLab/InternVL2_5-8B",
        suffixes=("-MPO",),
        vision="InternViT-300M",
        language="internlm2_5-7b-chat",
        text=_internlm(4096, 32, 32, 8, 14336, vocab_size=92553, rope_theta=1_000_000.0),
        image_token_id=92546,
        report_billion=8.1,
    ),
)

_FLASH = tuple(
    replace(
        model,
        name=f"{model.name}-Flash",
        hub_id=f"{model.hub_id}-Flash",
        suffixes=(),
        report_billion=None,
        active_billion=None,
        flash=True,
    )
    for model in _MODELS
    if model.name.startswith("InternVL3.5-") and not model.name.endswith(("20B-A4B", "241B-A28B"))
)
"""Released after ViCO, in the GitHub format only."""

ZOO: dict[str, ReleasedModel] = {model.name: model for model in (*_MODELS, *_FLASH)}
"""All released sizes by name; InternVL2.5-8B is there for VisualPRM-8B, which is built like it."""


def released(name: str) -> ReleasedModel:
    """A released size by its name.

    Args:
        name: A key of `ZOO`, in any case, for example ``"InternVL3.5-8B"``; ``_`` may stand for
            the dot, as in the names of repositories.

    Raises:
        ConfigError: If there is no such size; names the nearest.
    """
    names = {known.lower(): known for known in ZOO}
    wanted = name.lower().replace("_", ".")
    if wanted not in names:
        near = get_close_matches(wanted, names, n=1)
        hint = f"; did you mean {names[near[0]]!r}?" if near else f"; known: {', '.join(ZOO)}"
        raise ConfigError(f"no released size is called {name!r}{hint}")
    return ZOO[names[wanted]]


def config_for(name: str) -> CascadeVLConfig:
    """The configuration of a released size.

    The thresholds of Flash models are not known here: they stand in their own config.json.

    Args:
        name: As for `released`.

    Raises:
        ConfigError: If there is no such size; names the nearest.
    """
    model = released(name)
    return CascadeVLConfig(
        vision_config=dict(_VISION[model.vision]),
        text_config=dict(model.text),
        image_token_id=model.image_token_id,
        template=model.template,
        tie_word_embeddings=False,
        drop_path_rate=0.0,
        flash_mode=model.flash,
        flash_layers="released" if model.flash else "all",
    )
