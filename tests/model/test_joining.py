from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.model import make_checkpoints as make
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.internvl import InternVLVisionConfig, InternVLVisionModel

from cascadevl.cli.main import main
from cascadevl.data.collate import collate
from cascadevl.errors import CheckpointError, ConfigError
from cascadevl.model import zoo
from cascadevl.model.conversion import convert
from cascadevl.model.joining import EMBEDDING, draw_projector, grown, join
from cascadevl.model.language_export import export_language
from cascadevl.model.loading import load
from cascadevl.train.objective import NEXT_TOKEN
from cascadevl.types import ImageRef, Message, Record

IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>")
IMAGE_TOKENS += ("<ref>", "</ref>", "<box>", "</box>")
NUM_KNOWN = 290


@cache
def text_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `NUM_KNOWN` tokens that knows turns, and nothing of pictures."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += make.HARMONY_TOKENS if family == "gpt_oss" else []
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=NUM_KNOWN,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(["What is written on the door? user system assistant"] * 9, trainer)
    filling = [f"filling{number}" for number in range(NUM_KNOWN - made.get_vocab_size())]
    made.add_tokens(filling)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


def text_tensors(family: str, *, tied: bool, rows: int = make.VOCAB) -> dict[str, Tensor]:
    """A text-only checkpoint's tensors, under the names of its own family."""
    tensors = {
        name.removeprefix("language_model."): tensor
        for name, tensor in make.github_tensors(family, tied=tied, seed=1).items()
        if name.startswith("language_model.")
    }
    tables = {name for name in tensors if any(w in name for w in ("embed", "lm_head", "output"))}
    return {name: t[:rows] if name in tables else t for name, t in tensors.items()}


def write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    path.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_language(
    path: Path, family: str = "qwen3", *, tied: bool = False, rows: int = make.VOCAB, **more: Any
) -> Path:
    config = make.llm_config(family) | {"vocab_size": rows, "tie_word_embeddings": tied} | more
    write(path, text_tensors(family, tied=tied, rows=rows), config)
    text_tokenizer(family).save_pretrained(path)
    return path


def write_vision(path: Path, vision: str = "300M", **more: Any) -> Path:
    """A repository of InternViT in the GitHub form: no prefix in its names."""
    tensors = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in make.github_tensors("qwen3", vision).items()
        if name.startswith("vision_model.")
    }
    return write(path, tensors, make.github_config("qwen3", vision)["vision_config"] | more)


def stored(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def halves_by_hand(family: str, vision: str, *, tied: bool) -> dict[str, Tensor]:
    """What the two halves hold, under the names of the whole."""
    text = {f"language_model.{n}": t for n, t in text_tensors(family, tied=tied).items()}
    towers = make.github_tensors("qwen3", vision)
    tower = {n: t for n, t in towers.items() if n.startswith("vision_model.")}
    return make.hf_tensors(tower | text)


def in_tables(name: str) -> bool:
    return name in (EMBEDDING, "lm_head.weight")


@pytest.mark.parametrize(("family", "vision"), make.BODIES)
def test_every_weight_is_its_source_s_bit_for_bit(tmp_path: Path, family: str, vision: str) -> None:
    tied = family in ("qwen2", "llama")
    tower = write_vision(tmp_path / "vit", vision)
    body = write_language(tmp_path / "llm", family, tied=tied)
    join(tower, body, tmp_path / "out", max_shard_bytes=30_000)
    found, sources = stored(tmp_path / "out"), halves_by_hand(family, vision, tied=tied)
    projector = {n for n in found if n.startswith("model.multi_modal_projector.")}
    assert found.keys() == sources.keys() | projector
    assert len(projector) == 6
    new = torch.arange(NUM_KNOWN, NUM_KNOWN + len(IMAGE_TOKENS))
    for name, source in sources.items():
        if in_tables(name):
            mean = source[:NUM_KNOWN].double().mean(dim=0).to(source.dtype)
            torch.testing.assert_close(found[name][new], mean.expand(len(new), -1))
            kept = torch.ones(len(source), dtype=torch.bool).index_fill(0, new, value=False)
            assert torch.equal(found[name][kept], source[kept])
        else:
            assert torch.equal(found[name], source), name
    model, _ = load(tmp_path / "out")
    assert model.config.tie_word_embeddings is tied


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm3"])
def test_plain_transformers_opens_it_and_computes_the_same(tmp_path: Path, family: str) -> None:
    join(write_vision(tmp_path / "vit"), write_language(tmp_path / "llm", family), tmp_path / "out")
    plain, info = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    ours, processor = load(tmp_path / "out")
    ids = torch.tensor([[5, 9, *[processor.image_token_id] * 4, 40, 41, 42]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.eval()(input_ids=ids, pixel_values=pixels).logits
        found = ours(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.isfinite(found).all()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == processor.image_token_id


@pytest.mark.parametrize("tied", [False, True])
def test_tables_that_are_too_short_grow(tmp_path: Path, tied: bool) -> None:
    body = write_language(tmp_path / "llm", tied=tied, rows=NUM_KNOWN)
    join(write_vision(tmp_path / "vit"), body, tmp_path / "out")
    model, processor = load(tmp_path / "out")
    wanted = NUM_KNOWN + len(IMAGE_TOKENS)
    assert model.config.text_config.vocab_size == wanted
    assert model.get_input_embeddings().weight.shape == (wanted, make.WIDTH)
    assert model.lm_head.weight.shape == (wanted, make.WIDTH)
    ids = processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    assert ids == list(range(NUM_KNOWN, wanted))  # in the released order
    added = processor.tokenizer.added_tokens_decoder
    assert all(added[number].special for number in ids)
    text = "What is written on the door?"
    assert processor.tokenizer(text).input_ids == text_tokenizer("qwen3")(text).input_ids


def test_tokens_that_are_there_keep_their_rows(tmp_path: Path) -> None:
    whole = make.write_github(tmp_path / "github", "qwen3")
    export_language(whole, tmp_path / "text")
    join(whole, tmp_path / "text", tmp_path / "out")
    found, source = stored(tmp_path / "out"), make.hf_tensors(make.github_tensors("qwen3"))
    assert found.keys() == source.keys()
    new = [name for name in source if not torch.equal(found[name], source[name])]
    assert new
    assert all(name.startswith("model.multi_modal_projector.") for name in new)


@pytest.mark.parametrize("layout", ["github", "hf", "hf_old", "transformers"])
def test_vision_towers_of_every_form(tmp_path: Path, layout: str) -> None:
    github = make.github_tensors("gpt_oss")
    expected = {n: t for n, t in make.hf_tensors(github).items() if "vision_tower" in n}
    if layout == "transformers":
        config = make.hf_config("qwen3")["vision_config"]
        model = InternVLVisionModel(InternVLVisionConfig(**config))
        names = {n.removeprefix("model.vision_tower."): t for n, t in expected.items()}
        model.load_state_dict(names)
        model.save_pretrained(tmp_path / "vit")
    else:
        make.write_github(tmp_path / "whole", "gpt_oss")
        if layout == "github":
            (tmp_path / "whole").rename(tmp_path / "vit")
        else:
            convert(tmp_path / "whole", tmp_path / "vit", layout=layout)  # type: ignore[arg-type]
    join(tmp_path / "vit", write_language(tmp_path / "llm"), tmp_path / "out")
    found = stored(tmp_path / "out")
    assert {n for n in found if "vision_tower" in n} == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_configuration_and_processor_files(tmp_path: Path) -> None:
    whole = make.write_github(tmp_path / "whole", "qwen3")
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(
        json.dumps(config | {"max_dynamic_patch": 6, "use_thumbnail": False})
    )
    join(whole, write_language(tmp_path / "llm", "gpt_oss"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["template"] == "internvl3_5_gpt_oss"  # of the body, not of the vision tower's
    assert (config["min_tiles"], config["max_tiles"], config["use_thumbnail"]) == (1, 6, False)
    assert config["image_seq_length"] == make.TOKENS_PER_TILE
    assert config["trained_context"] == 512
    assert config["drop_path_rate"] == 0.1
    _, processor = load(tmp_path / "out")
    tiling = processor.tiling
    assert (tiling.tile_px, tiling.max_tiles, tiling.thumbnail) == (56, 6, False)
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert processor.tokenizer.convert_tokens_to_ids("<|return|>") in ends


def test_an_example_trains_every_part(tmp_path: Path) -> None:
    join(write_vision(tmp_path / "vit"), write_language(tmp_path / "llm"), tmp_path / "out")
    model, processor = load(tmp_path / "out")
    picture = tmp_path / "red.png"
    Image.new("RGB", (90, 40), (200, 30, 40)).save(picture)
    answer = "<ref>red</ref><box>[[0, 0, 9, 9]]</box>"
    record = Record(
        source="here",
        record_id="0",
        messages=(
            Message.of("user", ImageRef(picture), "What is it?"),
            Message.of("assistant", answer),
        ),
    )
    batch = collate(
        [[processor.builder(record)]],
        image_token_id=processor.image_token_id,
        pad_token_id=0,
        tokens_per_tile=processor.tokens_per_tile,
        averaging="token",
    )
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        loss = NEXT_TOKEN.loss(model, batch, NEXT_TOKEN.weigh(batch)).loss
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimiser.step()
    assert losses[1] < losses[0]


def test_to_the_github_layout_and_back(tmp_path: Path) -> None:
    body = write_language(tmp_path / "llm", "internlm2")
    join(write_vision(tmp_path / "vit", "6B"), body, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "github", layout="github")
    convert(tmp_path / "github", tmp_path / "back", layout="hf")
    found, expected = stored(tmp_path / "back"), stored(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert load(tmp_path / "github")[0].config.text_config.model_type == "llama"


def test_the_projector_is_the_seed_s(tmp_path: Path) -> None:
    tower, body = write_vision(tmp_path / "vit"), write_language(tmp_path / "llm")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        join(tower, body, tmp_path / name, seed=seed)
    a, b, c = (stored(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    differing = {name for name in a if not torch.equal(a[name], c[name])}
    start = "model.multi_modal_projector."
    assert differing == {f"{start}linear_1.weight", f"{start}linear_2.weight"}


def test_what_the_projector_is_drawn_as() -> None:
    shapes = {"layer_norm.weight": (8,), "linear.weight": (300, 400), "linear.bias": (300,)}
    drawn = draw_projector(shapes, std=0.02, dtype=torch.bfloat16, seed=3)
    assert torch.equal(drawn["layer_norm.weight"], torch.ones(8, dtype=torch.bfloat16))
    assert not drawn["linear.bias"].any()
    assert drawn["linear.weight"].dtype == torch.bfloat16
    assert float(drawn["linear.weight"].float().std()) == pytest.approx(0.02, rel=0.02)


def test_rows_of_new_tokens() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]])  # the last was never trained
    result = grown(table, num_rows=5, known=2, new=(2, 3))
    mean = [2.0, 4.0]
    assert result.tolist() == [[1.0, 2.0], [3.0, 6.0], mean, mean, mean]
    assert grown(table, num_rows=2, known=2, new=()).tolist() == table[:2].tolist()
    assert grown(table.to("meta"), num_rows=5, known=2, new=(2,)).shape == (5, 2)


def test_a_vision_tower_of_another_type_takes_the_language_model_s(tmp_path: Path) -> None:
    body = write(
        tmp_path / "llm",
        {n: t.bfloat16() for n, t in text_tensors("qwen3", tied=False).items()},
        make.llm_config("qwen3"),
    )
    text_tokenizer("qwen3").save_pretrained(body)
    join(write_vision(tmp_path / "vit"), body, tmp_path / "out")
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> str:
    """A released size as small as the test's halves, with fewer rows than the language model."""
    text = {
        key: value
        for key, value in make.llm_config("qwen2").items()
        if key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
        or key in ("num_key_value_heads", "intermediate_size", "rope_theta", "rms_norm_eps")
    }
    text |= {"vocab_size": 300, "max_position_embeddings": 256, "tie_word_embeddings": False}
    text["rope_scaling"] = {"rope_type": "dynamic", "factor": 4.0}
    model = zoo.ReleasedModel(
        name="InternVL3-0B",
        hub_id="none/none",
        suffixes=(),
        vision="InternViT-300M",
        language="none",
        text=text,
        image_token_id=NUM_KNOWN + 2,
        report_billion=0.0,
    )
    vision = make.hf_config("qwen2")["vision_config"]
    monkeypatch.setitem(zoo.ZOO, model.name, model)
    monkeypatch.setitem(zoo._VISION, "InternViT-300M", vision)
    return model.name


def test_a_released_size_gives_rows_context_and_a_head_of_its_own(
    tmp_path: Path, tiny_size: str
) -> None:
    body = write_language(tmp_path / "llm", "qwen2", tied=True)
    join(write_vision(tmp_path / "vit"), body, tmp_path / "out", size=tiny_size)
    found, config = stored(tmp_path / "out"), load(tmp_path / "out")[0].config
    assert found[EMBEDDING].shape == found["lm_head.weight"].shape == (300, make.WIDTH)
    assert torch.equal(found[EMBEDDING], found["lm_head.weight"])
    assert config.text_config.vocab_size == 300
    assert config.trained_context == config.text_config.max_position_embeddings == 256
    assert config.text_config.rope_parameters["factor"] == 4.0
    assert not config.tie_word_embeddings


def test_halves_of_another_size_are_refused_with_both_numbers(
    tmp_path: Path, tiny_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, body = write_vision(tmp_path / "vit"), write_language(tmp_path / "llm", "qwen2")
    assert zoo.released("internvl3_5-8b").name == "InternVL3.5-8B"
    other = write_vision(tmp_path / "other", "6B")
    with pytest.raises(CheckpointError, match=r"other is not the half .* norm_type is rms_norm"):
        join(other, body, tmp_path / "out", size=tiny_size)
    monkeypatch.setitem(zoo.ZOO[tiny_size].text, "num_attention_heads", 8)
    with pytest.raises(CheckpointError, match=r"num_attention_heads is 4 but should be 8"):
        join(tower, body, tmp_path / "out", size=tiny_size)
    with pytest.raises(ConfigError, match=r"did you mean 'InternVL3\.5-8B'"):
        join(tower, body, tmp_path / "out", size="internvl3_5-8bb")
    assert not (tmp_path / "out").exists()


def test_a_size_without_room_for_the_tokens_is_refused(
    tmp_path: Path, tiny_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoo.ZOO[tiny_size].text, "vocab_size", 295)
    tower, body = write_vision(tmp_path / "vit"), write_language(tmp_path / "llm", "qwen2")
    with pytest.raises(CheckpointError, match=r"needs 299 rows .* InternVL3-0B has 295"):
        join(tower, body, tmp_path / "out", size=tiny_size)


def test_tensors_that_do_not_fit_name_folder_and_shapes(tmp_path: Path) -> None:
    tower, body = write_vision(tmp_path / "vit"), write_language(tmp_path / "llm")
    tall = write_vision(tmp_path / "tall", image_size=112)
    with pytest.raises(CheckpointError, match=r"tall: .*\(1, 17, 16\) but should be \(1, 65, 16\)"):
        join(tall, body, tmp_path / "out")
    deep = write_language(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"deep: .* 11 missing"):
        join(tower, deep, tmp_path / "out")


def test_folders_that_are_no_half_are_refused(tmp_path: Path) -> None:
    tower, body = write_vision(tmp_path / "vit"), write_language(tmp_path / "llm")
    whole = make.write_github(tmp_path / "whole", "qwen3")
    with pytest.raises(CheckpointError, match=r"no vision tower: .*'qwen3'"):
        join(body, body, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--language-only"):
        join(tower, whole, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"llm2: language model .* is not supported"):
        join(tower, write(tmp_path / "llm2", {}, {"model_type": "mamba"}), tmp_path / "out")
    (body / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        join(tower, body, tmp_path / "out")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower, body = write_vision(tmp_path / "vit"), write_language(tmp_path / "llm")
    words = ["join", "--vision", str(tower), "--language", str(body), "--out"]
    assert main([*words, str(tmp_path / "out"), "--seed", "5"]) == 0
    assert f"cascadevl train pretrain --model {tmp_path / 'out'}" in capsys.readouterr().out
    join(tower, body, tmp_path / "same", seed=5)
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "same")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
