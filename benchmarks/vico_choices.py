"""Two choices of ViCO's first stage: what is kept of a distribution, and where compression begins.

First: how much of the divergence of compressed from full tiles is lost when only the reference's k
most probable tokens and one bucket are kept, before any training. Second: the divergence in short
runs whose second projector starts as the mean of the first one's tokens, or from random weights.

Neither depends on the machine. Runs that are done are not done again.
Run: ``python benchmarks/vico_choices.py --out runs/vico_choices``. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experiment import finished, kept, markdown, quiet

from cascadevl.config import load_config
from cascadevl.data.consistency import ConsistencyBatch, ConsistencyCollate
from cascadevl.data.meta import read_meta
from cascadevl.losses.vico import merged_kl, top_tokens, whole_kl
from cascadevl.model.flash import add_flash
from cascadevl.model.flash_start import start_as_mean
from cascadevl.model.loading import load, save
from cascadevl.tasks.naming import weighted
from cascadevl.train.sources import collate_config
from cascadevl.train.vico import ViCOConfig, heads_for, make_compressible, sample_builder, vico
from cascadevl.types import Batch

KEPT = (1, 4, 16, 64, 256)
STARTS = ("mean", "random")
COMPARED = 10
"""Steps whose mean is compared."""


def main() -> None:
    """Measure what is missing, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/vico_micro.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/vico_choices"))
    parser.add_argument("--scenes", type=int, default=12, help="of each data set")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(ViCOConfig, files=[args.config])
    config = replace(config, batch=replace(config.batch, row_tokens=args.row_tokens))
    lost = kept(args.out / "lost.json", lambda: lost_by_k(config, args.scenes))
    curves = {
        f"{start}, seed {seed}": kept(
            args.out / f"{start}-{seed}.json",
            lambda start=start, seed=seed: curve(config, start, seed, args.steps, args.out),
        )
        for start in STARTS
        for seed in args.seeds
    }
    header = ["data set", "divergence", *(f"k = {k}" for k in KEPT)]
    rows = [
        [name, f"{found['whole']:.3f}", *(f"{found[str(k)]:.2f} %" for k in KEPT)]
        for name, found in lost.items()
    ]
    print("Lost of the divergence:\n" + markdown(header, rows))
    windows = list(range(0, args.steps, COMPARED))
    header = ["start", *(f"steps {first + 1} to {first + COMPARED}" for first in windows)]
    rows = [
        [name, *(f"{value:.3f}" for value in found["kl_compressed"])]
        for name, found in curves.items()
    ]
    print("Divergence of compressed pictures:\n" + markdown(header, rows))
    print(json.dumps({"lost": lost, "starts": curves}))


@torch.no_grad()
def lost_by_k(config: ViCOConfig, num_scenes: int) -> dict[str, dict[str, float]]:
    """Of each data set the mean divergence, and percent of it lost by the number of tokens kept."""
    model, processor = load(str(config.model.path), dtype=torch.float32)
    make_compressible(model, config)
    always = replace(config, vico=replace(config.vico, compress=1.0))
    build = sample_builder(always, processor, model.config)
    collate = ConsistencyCollate(packed=collate_config(config.batch, processor, model.config))
    found = {}
    for spec in (spec for path in config.data.meta for spec in read_meta(path)):
        source: Any = weighted(spec).source
        batch: ConsistencyBatch = collate([[build(source[n]) for n in range(num_scenes)]])
        assert batch.full is not None
        full, packed = (scores(model.eval(), seen) for seen in (batch.full, batch.packed))
        whole = whole_kl(packed, full).mean().item()
        found[spec.name] = {"whole": whole} | {
            str(k): 100 * (1 - merged_kl(packed, top_tokens(full, k)).mean().item() / whole)
            for k in KEPT
        }
    return found


def scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Scores of the whole vocabulary at every target."""
    chunks: list[torch.Tensor] = []

    def head(logits: torch.Tensor, where: slice) -> torch.Tensor:
        del where
        chunks.append(logits)
        return logits[:, 0]

    model(batch=batch, head_fn=head)
    return torch.cat(chunks)


def curve(config: ViCOConfig, start: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """Divergence of compressed pictures in a run from one of the starts, window by window."""
    model, processor = load(str(config.model.path))
    add_flash(model, seed=seed, num_heads=heads_for(model.config))
    if start == "mean":
        start_as_mean(model)
    folder = out / f"{start}-{seed}"
    save(model, processor, folder / "start")
    run = replace(
        config.run, num_steps=steps, seed=seed, out=folder / "run", resume=True, log_interval=1
    )
    begun = replace(config.model, path=str(folder / "start"))
    finished(vico(replace(config, model=begun, run=run), console=quiet()))
    lines = (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    values = [json.loads(line).get("kl_compressed") for line in lines]
    windows = [values[first : first + COMPARED] for first in range(0, steps, COMPARED)]
    given = [[value for value in window if value is not None] for window in windows]
    return {"kl_compressed": [sum(window) / len(window) for window in given]}


if __name__ == "__main__":
    main()
