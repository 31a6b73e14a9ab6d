"""TRL's side of bench_gspo.py: runs under another environment's Python and is told what to do.

It imports nothing of cascadevl. Each line on stdin is a JSON request, each line on stdout its
answer: ``loss`` computes TRL's own loss of given answers in float32; ``train`` opens a
`GRPOTrainer`, which does a rollout batch whenever a ``round`` is asked for, and sleeps in between.

Prompts are tokenised and cut into tiles already: `Prepared` stands where TRL wants a processor and
finds them by number, which a message's text and the one pixel of a stand-in picture hold.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import PIL.Image
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, InternVLForConditionalGeneration, TrainerCallback
from transformers.processing_utils import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Closed(Exception):
    """The trainer is to be given up."""


class Tiles:
    """Says how many tiles stand-in pictures have."""

    def __init__(self, tiles: list[torch.Tensor]) -> None:
        """Keep the tiles of every prompt."""
        self.tiles = tiles

    def __call__(self, images: list[list[PIL.Image.Image]], **_: Any) -> dict[str, torch.Tensor]:
        """Tiles of each picture."""
        found = [image.getpixel((0, 0)) for group in images for image in group]
        return {"num_patches": torch.tensor([len(self.tiles[p[0] + 256 * p[1]]) for p in found])}


class Prepared(ProcessorMixin):
    """A processor that looks prompts up."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        """Bind the tokenizer."""
        super().__init__(tokenizer, chat_template=chat_template)
        self.ids: list[torch.Tensor] = []
        self.tiles: list[torch.Tensor] = []

    def holding(self, ids: list[torch.Tensor], tiles: list[torch.Tensor]) -> Prepared:
        """The same with prompts."""
        self.ids, self.tiles, self.image_processor = ids, tiles, Tiles(tiles)
        return self

    def apply_chat_template(
        self, conversation: Any, tokenize: bool = False, return_dict: bool = False, **_: Any
    ) -> Any:
        """Numbers as text, or the prompts of these numbers."""
        del return_dict
        if not tokenize:
            return _text(conversation)
        numbers = [int(_text(messages)) for messages in conversation]
        return {
            "input_ids": [self.ids[n].tolist() for n in numbers],
            "pixel_values": torch.cat([self.tiles[n] for n in numbers]),
        }

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> Any:
        """The tiles of prompts by their numbers."""
        from transformers.feature_extraction_utils import BatchFeature

        del images
        return BatchFeature({"pixel_values": torch.cat([self.tiles[int(t)] for t in text])})


def _text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return next(part["text"] for part in content if part["type"] == "text")


def chance(completions: list[Any], **_: Any) -> list[float]:
    """A reward that is never the same for a whole group."""
    return [random.random() for _ in completions]


class Side:
    """The prompts, the checkpoint, and the channel to the program that asks."""

    def __init__(self, folder: Path, requests: TextIO, answers: TextIO) -> None:
        """Read prompts and tokenizer."""
        self.folder, self.requests, self.answers = folder, requests, answers
        tensors = load_file(folder / "prompts.safetensors")
        count = sum(name.startswith("ids.") for name in tensors)
        ids = [tensors[f"ids.{n}"] for n in range(count)]
        # Normalised once, before anything is timed.
        tiles = [
            (tensors[f"tiles.{n}"].permute(0, 3, 1, 2) / 255 - MEAN) / STD for n in range(count)
        ]
        self.ids = ids
        self.processor = Prepared(AutoTokenizer.from_pretrained(folder / "model"))
        self.processor.holding(ids, tiles)
        self.stops = json.loads((folder / "stops.json").read_text("utf-8"))["stop_token_ids"]

    def ask(self) -> dict[str, Any]:
        """The next request; the end of the channel is the end of the program."""
        line = self.requests.readline()
        return json.loads(line) if line else {"do": "exit"}

    def tell(self, answer: dict[str, Any]) -> None:
        """Answer."""
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

    def trainer(self, settings: dict[str, Any], *, bf16: bool, **more: Any) -> GRPOTrainer:
        """TRL's trainer with these settings."""
        model = InternVLForConditionalGeneration.from_pretrained(
            self.folder / "model",
            attn_implementation=settings.get("attention", "sdpa"),
            dtype=torch.float32,
        )
        model.generation_config.eos_token_id = self.stops
        num_answers = settings["prompts"] * settings["group"]
        an_update = num_answers // settings["updates"]
        batch = min(settings.get("batch", an_update), an_update)
        rows = Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": str(number)}],
                    "image": PIL.Image.new("RGB", (1, 1), (number % 256, number // 256, 0)),
                }
                for number in range(settings["prompts"])
            ]
        )
        config = GRPOConfig(
            output_dir=tempfile.mkdtemp(dir=self.folder),
            use_cpu=True,
            bf16=bf16,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=an_update // batch,
            steps_per_generation=num_answers // batch,
            num_generations=settings["group"],
            num_iterations=1,
            max_completion_length=settings["max_answer_tokens"],
            temperature=1.0,
            beta=0.0,
            epsilon=settings["clip"],
            epsilon_high=settings["clip"],
            importance_sampling_level="sequence",
            loss_type="grpo",
            max_steps=10**6,
            learning_rate=settings["lr"],
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        return GRPOTrainer(
            model=model,
            reward_funcs=chance,
            args=config,
            train_dataset=rows,
            processing_class=self.processor,
            **more,
        )

    def loss(self, settings: dict[str, Any]) -> None:
        """TRL's loss of given answers as one batch, in float32."""
        trainer = self.trainer(settings, bf16=False)
        trainer.model.eval()
        answers = settings["answers"]
        prompts = [self.ids[each["prompt"]] for each in answers]
        drawn = [torch.tensor(each["ids"]) for each in answers]
        pad = torch.nn.utils.rnn.pad_sequence
        old = [torch.tensor(each["old"]) for each in answers]
        inputs = {
            "prompt_ids": pad(prompts, batch_first=True, padding_side="left"),
            "prompt_mask": pad(
                [torch.ones_like(each) for each in prompts], batch_first=True, padding_side="left"
            ),
            "completion_ids": pad(drawn, batch_first=True),
            "completion_mask": pad([torch.ones_like(each) for each in drawn], batch_first=True),
            "advantages": torch.tensor([each["advantage"] for each in answers]),
            "old_per_token_logps": pad(old, batch_first=True),
            "pixel_values": torch.cat([self.processor.tiles[each["prompt"]] for each in answers]),
            "num_images": [1] * len(answers),
            "num_tiles": [len(self.processor.tiles[each["prompt"]]) for each in answers],
        }
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, inputs).item()
        self.tell({"loss": loss})

    def train(self, settings: dict[str, Any]) -> None:
        """Do a rollout batch for every ``round`` until something else is asked for."""
        torch.set_num_threads(settings["threads"])
        clock = Clock(self, settings["updates"])
        trainer = self.trainer(settings, bf16=True, callbacks=[clock])
        clock.trainer = trainer
        self.tell({"ready": True})
        try:
            trainer.train()
        except Closed:
            return


class Clock(TrainerCallback):
    """Waits before every rollout batch, and tells its time after it."""

    def __init__(self, side: Side, updates: int) -> None:
        """Begin with no trainer."""
        self.side, self.updates = side, updates
        self.trainer: GRPOTrainer | None = None
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Sleep until a round is asked for."""
        if state.global_step % self.updates:
            return
        if self.side.ask()["do"] != "round":
            self.side.tell({"closed": True})
            raise Closed
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Tell, after the last update of a batch."""
        if state.global_step % self.updates:
            return
        assert self.trainer is not None
        lengths = self.trainer._metrics["train"]["completions/mean_length"]
        self.side.tell({"seconds": time.perf_counter() - self.start, "length_tokens": lengths[-1]})


def main() -> None:
    """Serve the requests."""
    # Libraries print where they like; the channel is for answers alone.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    side = Side(Path(sys.argv[1]), sys.stdin, answers)
    side.tell({"trl": trl.__version__, "torch": torch.__version__})
    while (request := side.ask())["do"] != "exit":
        {"loss": side.loss, "train": side.train}[request["do"]](request)


if __name__ == "__main__":
    main()
