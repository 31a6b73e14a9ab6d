"""Adapters merged, written in peft's format, and opened by us, by peft and beside transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from tests.model import make_checkpoints as make
from tests.model.bodies import BODIES, body_model
from tests.model.test_export import logits, plain
from tests.train.test_lora import EVERYWHERE, adapted, moved, scores

from cascadevl.errors import CheckpointError
from cascadevl.model.adapter_files import save_adapter
from cascadevl.model.adapters import adapter_parameters, fingerprint, merged_reader
from cascadevl.model.conversion import convert
from cascadevl.model.loading import load, save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.train.lora import LoraConfig, add_adapters

FILES = ("adapter_config.json", "adapter_model.safetensors", "cascadevl_adapter.json")


def merged(name: str, model: CascadeVLForConditionalGeneration) -> Any:
    """A body of its own with the merged weights of a model."""
    alone, read = body_model(name, seed=9), merged_reader(model)
    alone.load_state_dict({key: read(key) for key in alone.state_dict()})
    return alone


@pytest.mark.parametrize("name", BODIES)
def test_merged_equals_unmerged(name: str) -> None:
    model = moved(adapted(name))
    expected = scores(model)
    assert not torch.allclose(expected, scores(body_model(name)), atol=1e-2)
    # About 1e-7 of the values' size; gated experts make large values of random weights.
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(scores(merged(name, model)), expected, rtol=0, atol=tolerance)
    assert torch.equal(scores(model), expected)  # merging changed nothing in it


@pytest.mark.parametrize("variant", [{"dora": True}, {"rslora": True}])
def test_merged_equals_unmerged_in_both_variants(variant: dict[str, bool]) -> None:
    config = LoraConfig(parts=("vision", "language"), rank=3, **variant)
    model = adapted(config=config)
    torch.testing.assert_close(scores(model), scores(body_model("qwen3")), rtol=0, atol=1e-5)
    expected = scores(moved(model))
    torch.testing.assert_close(scores(merged("qwen3", model)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_merged_experts_by_hand(name: str) -> None:
    rank, alpha = 3, 5
    model = moved(adapted(name, LoraConfig(rank=rank, alpha=alpha)))
    place = "model.language_model.layers.1.mlp.experts"
    base = dict(body_model(name).named_parameters())
    beside = dict(model.named_parameters())
    for weight, wrapper in (("down_proj", place), ("gate_up_proj", f"{place}.base_layer")):
        a, b = (beside[f"{wrapper}.lora_{letter}.default.weight"] for letter in "AB")
        expected = base[f"{place}.{weight}"].detach().clone()
        num_experts = len(expected)
        assert a.shape[0] == b.shape[1] == rank * num_experts
        for expert in range(num_experts):
            # peft keeps the A of an expert together, and the B of all experts interleaved
            own_a = a[expert * rank : (expert + 1) * rank]
            own_b = b[:, expert::num_experts]
            change = own_b @ own_a * alpha / rank  # (out, in), as a linear layer has it
            expected[expert] += change.T if name == "gpt_oss" else change
        found = merged_reader(model)(f"{place}.{weight}")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_bfloat16_weights_are_summed_in_float32_and_rounded_once() -> None:
    model = body_model("qwen3").to(torch.bfloat16)
    add_adapters(model, EVERYWHERE, seed=0)
    moved(model)
    name = "model.language_model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    a, b = (getattr(layer, f"lora_{letter}").default.weight.float() for letter in "AB")
    exact = layer.base_layer.weight.float() + b @ a * 5 / 3
    assert torch.equal(merged_reader(model)(f"{name}.weight"), exact.to(torch.bfloat16))


def test_a_fingerprint_tells_weights_apart_but_not_precisions_or_adapters() -> None:
    word = fingerprint(body_model("qwen3"))
    assert fingerprint(moved(adapted("qwen3"))) == word
    assert fingerprint(body_model("qwen3").to(torch.bfloat16)) == word
    assert fingerprint(body_model("qwen3", seed=1)) != word


def base_folder(folder: Path, family: str = "qwen3") -> Path:
    """A small model of ours on disk."""
    model, processor = load(make.write_github(folder / "github", family))
    save(model, processor, folder / "base")
    return folder / "base"


def trained_adapter(
    folder: Path, family: str = "qwen3"
) -> tuple[CascadeVLForConditionalGeneration, Path]:
    """A model with an adapter that does something, and the folder of that adapter."""
    base = base_folder(folder, family)
    model, _ = load(base)
    add_adapters(model, EVERYWHERE, seed=0)
    moved(model.eval())
    model.config.trained_context = 77
    save_adapter(model, folder / "adapter", base=base)
    return model, folder / "adapter"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss", "internlm2"])
def test_an_adapter_opens_here_in_peft_and_on_plain_transformers(
    tmp_path: Path, family: str
) -> None:
    model, folder = trained_adapter(tmp_path, family)
    expected = logits(model)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)

    ours, processor = load(folder)
    assert torch.equal(logits(ours), expected)
    assert ours.config.trained_context == 77
    assert processor.tokenizer("a").input_ids

    base, _ = load(tmp_path / "base")
    assert not torch.allclose(logits(base), expected, atol=1e-2)
    wrapped = peft.PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(wrapped.eval()), expected)

    # Two implementations of one model: rounding apart.
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    theirs = peft.PeftModel.from_pretrained(plain(tmp_path / "base"), folder)
    torch.testing.assert_close(logits(theirs.eval()), expected, rtol=0, atol=tolerance)

    save(ours, processor, tmp_path / "merged")
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), expected, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks
def test_an_adapter_that_peft_wrote_opens_here(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1", "linear_2"])
    theirs = peft.get_peft_model(plain(base), config)
    moved(theirs.eval())
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = load(tmp_path / "adapter", base=base)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_a_loaded_adapter_has_the_type_that_is_asked_for(tmp_path: Path) -> None:
    _, folder = trained_adapter(tmp_path)
    model, _ = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.bfloat16}


def rewritten(folder: Path, file: str, **values: Any) -> None:
    """Change keys of a JSON file of an adapter."""
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


def test_a_base_that_moved_is_asked_for_and_another_one_refused(tmp_path: Path) -> None:
    _, folder = trained_adapter(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"its base model is not there.*base=.*--base DIR"):
        load(folder)
    load(folder, base=tmp_path / "moved")
    with pytest.raises(CheckpointError, match="a model of its own"):
        load(tmp_path / "moved", base=tmp_path / "moved")

    model, processor = load(tmp_path / "moved")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    save(model, processor, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other weights \(fingerprint"):
        load(folder, base=tmp_path / "other")
    (folder / FILES[2]).unlink()  # as peft writes it: nothing is known of its base
    load(folder, base=tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"fits another model: .* the first is"):
        load(folder, base=base_folder(tmp_path / "mixture", "qwen3_moe"))


def test_broken_and_unsupported_adapters_are_named(tmp_path: Path) -> None:
    _, folder = trained_adapter(tmp_path)
    cases = [
        (FILES[0], {"peft_type": "IA3"}, "of kind IA3"),
        (FILES[0], {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        (FILES[0], {"target_modules": ["nothing"]}, "cannot be opened"),
        (FILES[0], {"base_model_name_or_path": None}, "does not name the base"),
    ]
    for number, (file, values, message) in enumerate(cases):
        broken = tmp_path / str(number)
        shutil.copytree(folder, broken)
        rewritten(broken, file, **values)
        with pytest.raises(CheckpointError, match=message):
            load(broken)
    tensors = safetensors.torch.load_file(folder / FILES[1])
    tensors.pop(next(iter(tensors)))
    safetensors.torch.save_file(tensors, folder / FILES[1])
    with pytest.raises(CheckpointError, match=r"1 of .* tensors differ"):
        load(folder)
    (folder / FILES[1]).write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"is an adapter.*cascadevl merge"):
        convert(folder, tmp_path / "converted", layout="github")
