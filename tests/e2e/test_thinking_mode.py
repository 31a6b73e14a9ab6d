"""The mode is chosen by the system prompt and obeyed: data made, trained on, asked, sampled again.

A small model learns a few questions by heart in both modes. Then the system prompt alone must
decide which of the two answers it gives, in Python, in `chat`, and when it is itself the source of
thinking data.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cascadevl
from cascadevl.cli.main import main
from cascadevl.data.conversation import split_thinking
from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.data.prompts import THINKING_PROMPT
from cascadevl.data.tiling import TilingConfig
from cascadevl.data.tokenizer import build_tokenizer
from cascadevl.engine.conversation import answer
from cascadevl.eval.responder import ModelResponder, Responder, Sampler
from cascadevl.model.loading import save
from cascadevl.model.modeling import CascadeVLForConditionalGeneration
from cascadevl.model.presets import initialise, nano_config
from cascadevl.types import Message

SUMS = {"2 + 3?": ("2 and 3 more", "5"), "4 + 3?": ("4 and 3 more", "7"),
        "6 + 2?": ("6 and 2 more", "8"), "9 + 2?": ("9 and 2 more", "11")}  # fmt: skip


def thought(question: str) -> str:
    steps, result = SUMS[question]
    return f"<think>\n{steps}\n</think>\n\n{result}"


def save_start(folder: Path) -> None:
    """A model of one layer that knows nothing."""
    texts = [f"{question} {thought(question)} {THINKING_PROMPT}" for question in SUMS]
    tokenizer = build_tokenizer(texts * 4, 600)
    config = nano_config(
        len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        vision_config={"num_hidden_layers": 1},
        text_config={"num_hidden_layers": 2},
    )
    model = CascadeVLForConditionalGeneration(config)
    initialise(model, seed=0)
    processor = CascadeVLProcessor(
        tokenizer,
        system_message="",
        tiling=TilingConfig(tile_px=112, max_tiles=1),
        tokens_per_tile=config.tokens_per_tile,
    )
    save(model, processor, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the model trained on them, all by the command line."""
    folder = tmp_path_factory.mktemp("thinking")
    save_start(folder / "start")
    lines = [
        {"question": question, "answer": result, "solution": thought(question)}
        for question, (_, result) in SUMS.items()
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "think", str(folder / "data"), "--questions", f"{folder}/q.jsonl"]) == 0
    keys = {
        "model.precision": "float32",
        "data.prefetch": 0,
        "batch.row_tokens": 512,
        "batch.buffer_rows": 2,
        "optim.lr": 3e-3,
        "run.num_steps": 80,
    }
    words = ["train", "sft", "--model", str(folder / "start"), "--out", str(folder / "run")]
    words += ["--data", str(folder / "data" / "meta.json")]
    assert main([*words, *(f"--{key}={value}" for key, value in keys.items())]) == 0
    return folder


def test_the_system_prompt_chooses_the_mode(run: Path) -> None:
    model, processor = cascadevl.load(run / "run" / "model")
    for question, (_, result) in SUMS.items():
        direct = (Message.of("user", question),)
        asked = [(Message.of("system", THINKING_PROMPT), *direct), direct]
        texts = [each.text for each in answer(model, processor, asked, max_new_tokens=40)]
        assert texts == [thought(question), result]


@pytest.mark.parametrize("mode", ["on", "off"])
def test_chat_obeys_as_well(run: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chat", str(run / "run" / "model"), "--max-new-tokens", "40", "--thinking", mode]
    for question, (_, result) in SUMS.items():
        assert main([*words, "--question", question]) == 0
        said = capsys.readouterr()
        assert said.out.strip() == result
        reasoning = split_thinking(thought(question))[0]
        assert (reasoning.strip() in said.err) == (mode == "on")


def test_the_model_makes_thinking_data_itself(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampled solutions pass the filters where they are right: here all that it learned."""
    lines = [{"question": question, "answer": result} for question, (_, result) in SUMS.items()]
    lines.append({"question": "9 + 2?", "answer": "12"})
    (run / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--questions", str(run / "own.jsonl"), "--samples", "2"]
    words += ["--model", str(run / "run" / "model"), "--max-new-tokens", "40"]
    words += ["--temperature", "0.01"]
    assert main(["data", "think", str(run / "own"), *words]) == 0
    shown = capsys.readouterr().out
    assert "5 questions, 1 without a good solution; 4 thinking and 4 direct records" in shown
    records = (run / "own" / "thinking.jsonl").read_text().splitlines()
    kept = [json.loads(record)["conversations"][-1]["value"] for record in records]
    assert kept == [thought(question) for question in SUMS]
    report = json.loads((run / "own" / "report.json").read_text())
    assert report["dropped"] == {"duplicate": 4, "wrong_answer": 2}


def test_samples_of_a_model_depend_on_the_seed_alone_and_say_how_they_ended(run: Path) -> None:
    model, processor = cascadevl.load(run / "start")
    responder = ModelResponder(
        model=model, processor=processor, max_new_tokens=3, temperature=3.0, seed=4
    )
    assert isinstance(responder, Responder)
    assert isinstance(responder, Sampler)
    asked = [(Message.of("user", "2 + 3?"),)] * 3
    replies = responder.sample(asked, seed=4)
    assert [reply.text for reply in replies] == responder(asked)
    assert replies == responder.sample(asked, seed=4)
    assert replies != responder.sample(asked, seed=5)
    assert len({reply.text for reply in replies}) == 3  # each of them is drawn on its own
    assert {reply.finish for reply in replies} == {"length"}
    trained, processor = cascadevl.load(run / "run" / "model")
    (reply,) = ModelResponder(model=trained, processor=processor).sample(asked[:1], seed=0)
    assert (reply.text, reply.finish) == ("5", "stop")


@pytest.mark.slow
def test_the_benchmark_runs_and_does_nothing_twice(tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "benchmarks" / "thinking_mode.py"
    sizes = {"base-steps": 2, "steps": 2, "scenes": 12, "questions": 3, "rows": 3, "threads": 1}
    words = [sys.executable, str(program), "--out", str(tmp_path), "--seeds", "0", "1"]
    words += [f"--{name}={value}" for name, value in sizes.items()]
    outputs = []
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        outputs.append(json.loads(done.stdout.splitlines()[-1]))
        for log in tmp_path.rglob("metrics.jsonl"):
            assert len(log.read_text().splitlines()) == 2  # the first and the last step
    assert outputs[0] == outputs[1]
    scores = outputs[0]["scores"]
    assert {(score["mode"], score["what"]) for score in scores} == {
        (mode, what) for mode in ("think", "direct") for what in ("obeyed", "right")
    }
    assert all(score["num"] == 6 and len(score["seeds"]) == 2 for score in scores)
    # Models that learned nothing yet: no thinking anywhere, on paper and in the table.
    obeyed = {(score["mode"], score["percent"]) for score in scores if score["what"] == "obeyed"}
    assert obeyed == {("think", 0.0), ("direct", 100.0)}
