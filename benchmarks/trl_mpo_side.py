"""TRL's side of bench_mpo.py: its DPO trainer with MPO's three losses, told what to do as in SFT.

It imports nothing of cascadevl. ``loss`` computes TRL's own loss of single pairs in float32 against
a reference of other weights; ``train`` opens a `DPOTrainer`, which trains an epoch whenever a
``round`` is asked for. TRL computes the reference's log-probabilities once before training where no
pair has a picture, and beside every step, with a second copy of the model, where one has: it
refuses to store them for vision.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, TextIO

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration
from trl import DPOConfig, DPOTrainer
from trl_side import MEAN, STD, Channel, Clock, Closed, serve

LOSSES = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}


class GivenPairs(DPOTrainer):
    """Trains on pairs whose tokens are known, so that nothing is to be prepared."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class PairSide(Channel):
    """Pairs of answers."""

    def __init__(self, folder: Path, requests: TextIO, answers: TextIO) -> None:
        """Read the pairs."""
        super().__init__(folder, requests, answers)
        tensors = load_file(folder / "rows.safetensors")
        count = sum(name.startswith("prompt.") for name in tensors)
        self.pairs = [
            {name: tensors[f"{name}.{n}"] for name in ("prompt", "chosen", "rejected")}
            for n in range(count)
        ]
        # Normalised once, before anything is timed.
        self.tiles = [
            (tensors[f"tiles.{n}"].permute(0, 3, 1, 2) / 255 - MEAN) / STD for n in range(count)
        ]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Padded rows, chosen ones first, each with the tiles of its prompt: as TRL's collator."""
        pad = torch.nn.utils.rnn.pad_sequence
        pairs = [self.pairs[row["row"]] for row in rows]
        whole = [(pair["prompt"], pair[name]) for name in ("chosen", "rejected") for pair in pairs]
        ids = [torch.cat(parts) for parts in whole]
        answers = [
            torch.cat([torch.zeros_like(prompt), torch.ones_like(answer)])
            for prompt, answer in whole
        ]
        batch = {
            "input_ids": pad(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(each) for each in ids], batch_first=True),
            "completion_mask": pad(answers, batch_first=True),
        }
        if tiles := [self.tiles[row["row"]] for row in rows if len(self.tiles[row["row"]])]:
            batch["pixel_values"] = torch.cat([*tiles, *tiles])
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    def model(self, settings: dict[str, Any], name: str) -> InternVLForConditionalGeneration:
        """A model of the folder."""
        dtype = torch.bfloat16 if settings["weights"] == "bfloat16" else torch.float32
        return InternVLForConditionalGeneration.from_pretrained(
            self.folder / name, attn_implementation=settings["attention"], dtype=dtype
        )

    def trainer(self, settings: dict[str, Any], reference: str, **more: Any) -> DPOTrainer:
        """TRL's trainer with these settings."""
        numbers = settings["rows"]
        stored = reference == "model" and not any(len(self.tiles[n]) for n in numbers)
        lengths = [
            len(self.pairs[n]["prompt"])
            + max(len(self.pairs[n]["chosen"]), len(self.pairs[n]["rejected"]))
            for n in numbers
        ]
        model = self.model(settings, "model")
        config = DPOConfig(
            output_dir=tempfile.mkdtemp(dir=self.folder),
            use_cpu=True,
            bf16=settings["precision"] == "bfloat16" and model.dtype == torch.float32,
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
            max_length=None,
            beta=0.1,
            loss_type=list(LOSSES),
            loss_weights=list(LOSSES.values()),
            precompute_ref_log_probs=stored,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        other = None
        if not stored:
            other = self.model(settings, reference).eval().requires_grad_(False)
        return GivenPairs(
            model=model,
            ref_model=other,
            args=config,
            train_dataset=Dataset.from_dict({"row": numbers, "length": lengths}),
            processing_class=self.tokenizer,
            data_collator=self.collate,
            **more,
        )

    def loss(self, settings: dict[str, Any]) -> None:
        """TRL's loss of each pair by itself, in float32, against a reference of other weights."""
        trainer = self.trainer(settings, "reference")
        trainer.model.eval()
        with torch.no_grad():
            losses = [
                trainer.compute_loss(trainer.model, copy.copy(self.collate([{"row": n}]))).item()
                for n in settings["rows"]
            ]
        self.tell({"losses": losses})

    def train(self, settings: dict[str, Any]) -> None:
        """Train an epoch for every ``round`` until something else is asked for."""
        torch.set_num_threads(settings["threads"])
        trainer = self.trainer({**settings, "rounds": 10**6}, "model", callbacks=[Clock(self)])
        self.tell({"ready": True})
        try:
            trainer.train()
        except Closed:
            return


if __name__ == "__main__":
    serve(PairSide)
