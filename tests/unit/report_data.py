"""Writes an evaluation folder of made-up cells, with a dose-response that is known: for the tests of the report."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

ARCHITECTURES = ("gpt2", "llama", "gpt_neox")
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = (0, 1, 2)
ARMS = {"replay": 0.97, "permuted": 0.0, "clipping": 0.0}  # what part of feedback's effect each has
SHAPES = {"gpt2": 1.0, "llama": 0.9, "gpt_neox": 0.75}  # how strongly each reacts
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\0\x1b[31mred\x07 <!-- & \u202e ]]>"
DECODINGS = ("greedy", "sample", "top_p_95")
TEXT_METRICS = {"predictive_entropy": (4.2, -3.6, "nats"), "cross_entropy": (4.0, 3.0, "nats"), "top1_mass": (0.2, 0.6, "share"),
                "bits_per_byte": (1.9, 1.4, "bits")}  # fmt: skip
SAMPLE_METRICS = {"high_frequency_share": (0.5, 0.48, "share"), "distinct_2": (0.92, -0.6, "share"), "seq_rep_4": (0.01, 0.7, "share"),
                  "generation_entropy": (4.3, -3.9, "nats"), "mtld": (60.0, 0.0, "tokens")}  # fmt: skip
LINES = ["the garden was quiet and she said nothing of it.", "I cannot think so, said Emma, with a smile.", "and the and the and the and the"]


def write_evaluation(folder, architectures=ARCHITECTURES, levels=LEVELS, seeds=SEEDS, arms=True, units=16, extra_metrics=0,
                     decodings=DECODINGS, steps=60, untouched=True) -> Path:  # fmt: skip
    """evals/NAME with one cell per architecture, level and seed, arms at the second architecture, and an untouched model."""
    folder = Path(folder)
    plan = [(architecture, "feedback", level, seed) for architecture in architectures for level in levels for seed in seeds]
    if arms:
        home = architectures[min(1, len(architectures) - 1)]
        plan += [(home, arm, level, seed) for arm in ARMS for level in (0.5, 1.0) for seed in seeds]
    metrics = {f"metric_{number:02d}": (1.0, 0.5 * (-1) ** number, "share") for number in range(extra_metrics)}
    for architecture, arm, level, seed in plan:
        write_cell(folder, f"{architecture}-{arm}-{level:g}-{seed}", architecture, arm, level, seed, units, metrics, decodings, steps)
    if untouched:
        write_cell(folder, "pretrained", None, None, 0.0, None, units, metrics, decodings, 0)
    return folder


def write_cell(folder, name, architecture="gpt2", arm="feedback", level=0.0, seed=0, units=16, metrics=None, decodings=DECODINGS,
               steps=60) -> Path:  # fmt: skip
    """One cell; `architecture` None makes a model that no run of ours made."""
    cell = Path(folder) / "cells" / name
    cell.mkdir(parents=True)
    random = np.random.default_rng([seed or 0, round(1000 * level), len(architecture or "")])
    effect = level**1.3 * ARMS.get(arm, 1.0) * SHAPES.get(architecture, 1.0)
    own = sum(map(ord, architecture or "")) % 7 / 40  # where an architecture starts
    rows, items = [], []
    places = [(metric, None, split, value) for split in ("held_out", "train") for metric, value in TEXT_METRICS.items()]
    places += [(metric, decoding, None, value) for decoding in (*decodings, "reference")
               for metric, value in {**SAMPLE_METRICS, **(metrics or {})}.items()]  # fmt: skip
    offset = 0.15 * np.random.default_rng([seed or 0, 7]).standard_normal()  # a seed's own, the same at every level
    for metric, decoding, split, (start, change, unit) in places:
        noise = np.random.default_rng([units, len(metric)]).standard_normal(units)  # a prompt's own, the same in every cell
        value = start + (0.0 if decoding == "reference" else change * effect + (own + random.normal(0, 0.02) + offset) * abs(change) / 4)
        counts = np.full(units, 10.0)
        totals = counts * (value + 0.1 * abs(change) * (noise + 0.3 * random.standard_normal(units)))
        items.append(pd.DataFrame({"metric": metric, "decoding": decoding, "split": split, "unit_id": [str(u) for u in range(units)],
                                   "total": totals, "count": counts}))  # fmt: skip
        rows.append({"metric": metric, "decoding": decoding, "split": split, "value": totals.sum() / counts.sum(), "n": counts.sum(),
                     "units": units, "stderr": 0.01, "ci_low": value - 0.02, "ci_high": value + 0.02, "unit": unit, "settings": {},
                     "note": None})  # fmt: skip
    rows.append({"metric": "mauve", "decoding": "sample", "split": None, "value": None, "n": 0, "units": 0, "stderr": None, "ci_low": None,
                 "ci_high": None, "unit": "share", "settings": {}, "note": "the extra is not installed"})  # fmt: skip
    pd.concat(items).astype({"decoding": object, "split": object}).to_parquet(cell / "items.parquet", index=False)
    (cell / "scores.json").write_text(json.dumps({"version": 1, "rows": rows}))
    _write_samples(cell, decodings, units, level)
    run = _write_run(Path(folder), name, architecture, arm, level, seed, steps) if architecture else None
    meta = {"version": 1, "id": name, "model": f"runs/{name}/final", "suite": {"name": "made up"}, "suite_fingerprint": "f" * 8,
            "seeds": [0], "run": run, "high_frequency": {"file": "high_frequency.json", "sha": "a" * 8}, "world_size": 1,
            "device": "cpu", "versions": {"torch": "2"}, "git": None, "settings": {}, "seconds": {"units": 1.5}}  # fmt: skip
    (cell / "cell.json").write_text(json.dumps(meta))
    (cell / "DONE").write_text("")
    return cell


def _write_samples(cell, decodings, prompts, level) -> None:
    lines = []
    for decoding in decodings:
        for prompt in range(prompts):
            text = " ".join(["and the"] * 12) if level == 1 else " ".join(LINES[(prompt + i) % 2] for i in range(3))
            text = f"{text} marker-{prompt}-{decoding}-{level:g}"
            lines.append({"prompt": prompt, "decoding": decoding, "sample": 0, "seed": 0, "token_ids": [1, 2], "text": text, "finish": "length"})
    (cell / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts_file = [{"index": prompt, "text": f"Prompt {prompt}: It was", "reference_text": "a truth universally acknowledged"} for prompt in range(prompts)]
    (cell / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts_file))


def _write_run(folder, name, architecture, arm, level, seed, steps) -> dict:
    run = folder / "runs" / name
    run.mkdir(parents=True)
    random = np.random.default_rng([seed, round(level * 100)])
    lines = []
    for step in range(1, steps + 1):
        fall = 3.0 * np.exp(-step / 20)
        ratio = 1.0 if step <= 5 else max(0.02, 1 - level) + 0.02 * random.standard_normal()
        lines.append({"step": step, "loss": 4 - 2 * level + fall + 0.1 * random.standard_normal(), "cross_entropy": 4 + level + fall,
                      "stability/entropy": 4 - 3 * level + fall, "stability/variance_ratio": ratio, "stability/target_ratio": 1 - level,
                      "stability/saturated": int(level == 1), "stability/loss_deviation": 0.1 + 0.05 * level if step > 1 else None,
                      "stability/log_grad_norm_deviation": 0.2, "stability/loss_spikes": 0, "stability/grad_norm_spikes": seed})  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": name, "path": str(run), "level": level, "arm": arm, "seed": seed, "architecture": architecture,
            "axes": {"level": level, "architecture": architecture, "seed": seed}, "stability": {"controller": {"warmup_steps": 5}}}  # fmt: skip
