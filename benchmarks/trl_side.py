"""TRL's side of bench_sft.py: runs under another environment's Python and is told what to do.

It imports nothing of cascadevl. Each line on stdin is a JSON request, each line on stdout its
answer: ``loss`` computes TRL's own loss of one batch in float32; ``train`` opens an `SFTTrainer`,
which trains an epoch whenever a ``round`` is asked for, and sleeps in between.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, InternVLForConditionalGeneration, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Closed(Exception):
    """The trainer is to be given up."""


class Channel:
    """The folder with rows and checkpoint, and the channel to the program that asks."""

    def __init__(self, folder: Path, requests: TextIO, answers: TextIO) -> None:
        """Keep them."""
        self.folder, self.requests, self.answers = folder, requests, answers
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def ask(self) -> dict[str, Any]:
        """The next request; the end of the channel is the end of the program."""
        line = self.requests.readline()
        return json.loads(line) if line else {"do": "exit"}

    def tell(self, answer: dict[str, Any]) -> None:
        """Answer."""
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()


class Side(Channel):
    """Rows of fine-tuning."""

    def __init__(self, folder: Path, requests: TextIO, answers: TextIO) -> None:
        """Read the rows."""
        super().__init__(folder, requests, answers)
        tensors = load_file(folder / "rows.safetensors")
        count = sum(name.startswith("ids.") for name in tensors)
        self.ids = [tensors[f"ids.{n}"] for n in range(count)]
        self.labels = [tensors[f"labels.{n}"] for n in range(count)]
        # Normalised once, before anything is timed.
        self.tiles = [
            (tensors[f"tiles.{n}"].permute(0, 3, 1, 2) / 255 - MEAN) / STD for n in range(count)
        ]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Padded rows with the tiles of all of them: what TRL's own collator makes."""
        pad = torch.nn.utils.rnn.pad_sequence
        numbers = [row["row"] for row in rows]
        ids = [self.ids[n] for n in numbers]
        batch = {
            "input_ids": pad(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(each) for each in ids], batch_first=True),
            "labels": pad([self.labels[n] for n in numbers], batch_first=True, padding_value=-100),
        }
        if tiles := [self.tiles[n] for n in numbers if len(self.tiles[n])]:
            batch["pixel_values"] = torch.cat(tiles)
        return batch

    def trainer(self, settings: dict[str, Any], **more: Any) -> SFTTrainer:
        """TRL's trainer with these settings; TRL packs where that is asked for (text alone)."""
        dtype = torch.bfloat16 if settings["weights"] == "bfloat16" else torch.float32
        model = InternVLForConditionalGeneration.from_pretrained(
            self.folder / "model", attn_implementation=settings["attention"], dtype=dtype
        )
        numbers = settings["rows"]
        packing = settings["packing"]
        if packing:
            rows = Dataset.from_dict(
                {
                    "input_ids": [self.ids[n].tolist() for n in numbers],
                    "labels": [self.labels[n].tolist() for n in numbers],
                }
            )
            # As many optimiser steps an epoch as without packing.
            rows_a_step = len(pack_dataset(rows, packing, "bfd")) / settings["steps"]
            settings["accumulation"] = math.ceil(rows_a_step / settings["batch"])
        else:
            lengths = [len(self.ids[n]) for n in numbers]
            rows = Dataset.from_dict({"row": numbers, "length": lengths})
        config = SFTConfig(
            output_dir=tempfile.mkdtemp(dir=self.folder),
            use_cpu=True,
            bf16=settings["precision"] == "bfloat16" and dtype == torch.float32,
            per_device_train_batch_size=settings["batch"],
            gradient_accumulation_steps=settings["accumulation"],
            num_train_epochs=settings.get("rounds", 1),
            learning_rate=settings["lr"],
            lr_scheduler_type="constant",
            weight_decay=0.05,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            train_sampling_strategy="group_by_length" if settings["grouped"] else "random",
            packing=bool(packing),
            max_length=packing or None,
            dataset_kwargs=None if packing else {"skip_prepare_dataset": True},
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        return SFTTrainer(
            model=model,
            args=config,
            train_dataset=rows,
            processing_class=self.tokenizer,
            data_collator=None if packing else self.collate,
            **more,
        )

    def loss(self, settings: dict[str, Any]) -> None:
        """TRL's loss of all rows as one batch, in float32, with what its trainer would feed."""
        trainer = self.trainer(settings)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.eval()
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, dict(batch)).item()
        self.tell({"loss": loss, "width": batch["input_ids"].numel()})

    def train(self, settings: dict[str, Any]) -> None:
        """Train an epoch for every ``round`` until something else is asked for."""
        torch.set_num_threads(settings["threads"])
        trainer = self.trainer({**settings, "rounds": 10**6}, callbacks=[Clock(self)])
        self.tell({"ready": True})
        try:
            trainer.train()
        except Closed:
            return


class Clock(TrainerCallback):
    """Waits before every epoch, and tells its time after it."""

    def __init__(self, side: Channel) -> None:
        """Begin without a step."""
        self.side = side
        self.start = 0.0
        self.steps = 0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Sleep until a round is asked for."""
        if self.side.ask()["do"] != "round":
            self.side.tell({"closed": True})
            raise Closed
        self.steps = 0
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count."""
        self.steps += 1

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Tell."""
        self.side.tell({"seconds": time.perf_counter() - self.start, "steps": self.steps})


def serve(kind: type[Any]) -> None:
    """Serve the requests with one kind of side."""
    # Libraries print where they like; the channel is for answers alone.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    side = kind(Path(sys.argv[1]), sys.stdin, answers)
    side.tell({"trl": trl.__version__, "torch": torch.__version__})
    while (request := side.ask())["do"] != "exit":
        {"loss": side.loss, "train": side.train}[request["do"]](request)


if __name__ == "__main__":
    serve(Side)
