"""The three kinds of run that the fault driver disturbs: a training, an evaluation, a sweep of two cells.

Each knows its command line, the moment of a phase as it shows in files, and what must be the same at the end as in a run
that nobody disturbed.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ds_stability.run_dir import RunDir

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]
TINY = "attention_dropout=0.1,hidden_size=32,intermediate_size=56,num_attention_heads=2,num_key_value_heads=2,num_hidden_layers=2"
STEPS, SAVE_STEPS, PROBE_STEPS = 24, 4, 6
PROBES = (6, 12, 24)  # probes of the three thirds that no earlier third comes near
SWEEP_STEPS = 10
STABILITY = {
    "level": 0.5,
    "stabilizers": {"feedback": {}, "clipping": {}, "averaging": {"level": 0.3}},
    "controller": {"warmup_steps": 2, "ramp_steps": 2},
    "probe": {"interval": PROBE_STEPS, "num_prompts": 4, "max_new_tokens": 24},
}
SUITE = {
    "name": "tiny", "batch_size": 4, "max_new_tokens": 24, "samples_per_prompt": 2,
    "prompts": {"count": 24, "tokens": 6}, "text": {"held_out_windows": 16, "train_windows": 16, "window": 32},
    "minimal_pairs": {"enabled": False},
}  # fmt: skip
SWEEP = f"""
name: faults
num_gpus: 2
flags:
  config_name: {REPOSITORY}/ds_configs/models/gpt2_tiny.json
  dataset_name: builtin:synthetic
  synthetic_tokens: 5000
  deepspeed: {REPOSITORY}/ds_configs/zero3_cpu.json
  block_size: 64
  per_device_train_batch_size: 2
  max_steps: {SWEEP_STEPS}
  learning_rate: 1.0e-3
  save_strategy: steps
  save_steps: 4
  stability.loss_path: linear
  stability.controller.warmup_steps: 2
grid:
  stability.level: [0, 0.5]
"""
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "bright", "stars", "shine", "on", "cold", "water", "near", "old", "stone", "walls"]


@dataclass(frozen=True)
class Moment:
    """When to strike: `come` is true from the beginning of the phase on, `inside` as long as the phase lasts."""

    words: str
    come: Callable[[], bool]
    inside: Callable[[], bool]


def metric_lines(run: RunDir) -> list[bytes]:
    """The whole lines of metrics.jsonl."""
    try:
        return run.metrics.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def last_step(run: RunDir) -> int:
    lines = metric_lines(run)
    return json.loads(lines[-1])["step"] if lines else 0


def whole_files(folder: Path) -> dict[str, bytes]:
    """The weights and the JSON of a final/; the model card holds a date."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".json")}


class Training:
    """launchers/train.py: phases training, checkpoint and probing."""

    phases = ("training", "checkpoint", "probing")
    lives_on = False  # after a lost rank nothing of it is left, and a restart is needed

    def __init__(self, shared: Path):
        self.shared = shared

    def prepare(self) -> None:
        config = json.loads((REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text(encoding="utf-8"))
        (self.shared / "ds.json").write_text(json.dumps(config | {"stability": STABILITY}), encoding="utf-8")

    def command(self, output: Path, port: int, **changed: object) -> list[str]:
        """The whole command; `changed`: flags with other values, None leaves one out."""
        flags = {
            "config_name": REPOSITORY / "ds_configs" / "models" / "llama_tiny.json", "config_overrides": TINY,
            "vocab_size": 300, "dataset_name": "builtin:prose", "block_size": 32, "deepspeed": self.shared / "ds.json",
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 0.01,
            "save_steps": SAVE_STEPS, "save_total_limit": 4, "output_dir": output, "resume_from_checkpoint": "auto",
            "disable_tqdm": True, **changed,
        }  # fmt: skip
        words = [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]
        return [*LAUNCHER, "--num_gpus", "2", "--master_port", str(port), str(REPOSITORY / "launchers" / "train.py"), *words]

    def moment(self, output: Path, phase: str, position: int, draw: random.Random) -> Moment:
        """A moment of the `position`-th third of the run, so that a restarted run comes to the next one."""
        run, first = RunDir(output), 8 * position
        if phase == "checkpoint":
            step = draw.choice([first + SAVE_STEPS, first + 2 * SAVE_STEPS])
            beside, whole = output / f".saving-{step}", run.checkpoint(step)
            return Moment(f"checkpoint-{step}", lambda: beside.exists() or whole.exists(), lambda: not whole.exists())
        if phase == "probing":
            step = PROBES[position % len(PROBES)]  # the line of the step before is written right before the probe
            sampled = run.sample_file(step)
            return Moment(f"probe of step {step}", lambda: last_step(run) >= step - 1, lambda: not sampled.exists())
        step = first + draw.randint(3 if first else 0, 5)
        if step == 0:
            return Moment("first step", run.manifest.exists, lambda: not run.done.exists())
        return Moment(f"step {step}", lambda: last_step(run) >= step, lambda: not run.done.exists())

    def logs(self, output: Path, log: Path, position: int | None = None) -> list[Path]:
        return [log]

    def done(self, output: Path) -> bool:
        return RunDir(output).done.exists()

    def resumes_at(self, output: Path) -> int:
        """Step of the newest whole checkpoint; 0 without one."""
        run = RunDir(output)
        return max((step for step, _ in run.complete_checkpoints()), default=0) if run.manifest.exists() else 0

    def kept(self, output: Path) -> bytes:
        """The lines up to the newest whole checkpoint: they hold times, so only a run that goes on from there keeps them."""
        step, lines = self.resumes_at(output), metric_lines(RunDir(output))
        return b"".join(line + b"\n" for line in lines if json.loads(line)["step"] <= step)

    def keeps(self, output: Path, before: bytes) -> bool:
        return not before or RunDir(output).metrics.read_bytes().startswith(before)

    def results(self, output: Path) -> dict[str, bytes]:
        run = RunDir(output)
        rows = [json.loads(line) for line in metric_lines(run)]
        rows = [{key: row[key] for key in row if not key.endswith(("_seconds", "_per_second"))} for row in rows]
        samples = {f"samples/{path.name}": path.read_bytes() for path in sorted(run.samples.iterdir())}
        return whole_files(run.final) | samples | {"metrics": json.dumps(rows).encode()}


class Evaluation:
    """eval/run.py on a tiny random model: phase evaluation."""

    phases = ("evaluation",)
    lives_on = False

    def __init__(self, shared: Path):
        self.shared = shared

    def prepare(self) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from ds_stability.data.tokenizer import train_bpe

        for name, seed in (("held.txt", 0), ("train.txt", 1)):
            (self.shared / name).write_text(prose(seed), encoding="utf-8")
        (self.shared / "suite.yaml").write_text(json.dumps(SUITE), encoding="utf-8")
        tokenizer = train_bpe([prose(1)], 300)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(self.shared / "model")
        tokenizer.save_pretrained(self.shared / "model")

    def command(self, output: Path, port: int) -> list[str]:
        words = ["--model", self.shared / "model", "--cell_names", "cell", "--suite", self.shared / "suite.yaml",
                 "--held_out_file", self.shared / "held.txt", "--train_file", self.shared / "train.txt",
                 "--output_dir", output]  # fmt: skip
        return [*LAUNCHER, "--num_gpus", "2", "--master_port", str(port), str(REPOSITORY / "eval" / "run.py"), *map(str, words)]

    def moment(self, output: Path, phase: str, position: int, draw: random.Random) -> Moment:
        units = 20 * position + draw.randint(0, 12)
        return Moment(f"{units} units", lambda: self._started(output) and self._journaled(output) >= units,
                      lambda: not self.done(output))  # fmt: skip

    def _started(self, output: Path) -> bool:
        return any(self._journals(output))

    def _journals(self, output: Path) -> list[Path]:
        return sorted((output / "cells" / "cell" / "journal").glob("rank-*.jsonl"))

    def _journaled(self, output: Path) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self._journals(output))

    def logs(self, output: Path, log: Path, position: int | None = None) -> list[Path]:
        return [log]

    def done(self, output: Path) -> bool:
        return (output / "cells" / "cell" / "DONE").exists()

    def resumes_at(self, output: Path) -> int:
        """Units in the journal."""
        return self._journaled(output)

    def kept(self, output: Path) -> bytes:
        return str(self._journaled(output)).encode()

    def keeps(self, output: Path, before: bytes) -> bool:
        return self.done(output) or self._journaled(output) >= int(before or 0)

    def results(self, output: Path) -> dict[str, bytes]:
        names = ("samples.jsonl", "scores.json", "items.parquet")
        return {name: (output / "cells" / "cell" / name).read_bytes() for name in names}


class TwoCells:
    """`ds-stability sweep`: a rank of a cell is lost, and the sweep itself takes the cell up again."""

    phases = ("sweep",)
    lives_on = True

    def __init__(self, shared: Path):
        self.shared = shared

    def prepare(self) -> None:
        (self.shared / "faults.yaml").write_text(SWEEP, encoding="utf-8")

    def command(self, output: Path, port: int) -> list[str]:
        return [sys.executable, "-m", "ds_stability.cli", "sweep", str(self.shared / "faults.yaml"), "--output_dir", str(output)]

    def cells(self, output: Path) -> list[str]:
        try:
            return [cell["id"] for cell in json.loads((output / "sweep.json").read_text(encoding="utf-8"))["cells"]]
        except FileNotFoundError:
            return []

    def moment(self, output: Path, phase: str, position: int, draw: random.Random) -> Moment:
        step = draw.randint(1, SWEEP_STEPS - 2)

        def cell() -> RunDir | None:
            names = self.cells(output)
            return RunDir(output / names[position % len(names)]) if names else None

        return Moment(f"cell {position % 2 + 1}, step {step}", lambda: cell() is not None and last_step(cell()) >= step,
                      lambda: not cell().done.exists())  # fmt: skip

    def logs(self, output: Path, log: Path, position: int | None = None) -> list[Path]:
        """All, or those of the cell that is struck in a trial's `position`."""
        names = self.cells(output)
        if position is not None and names:
            return sorted((output / "logs").glob(f"{names[position % len(names)]}.attempt-*.log"))
        return [log, *sorted((output / "logs").glob("*.log"))]

    def done(self, output: Path) -> bool:
        return bool(self.cells(output)) and all((output / name / "DONE").exists() for name in self.cells(output))

    def resumes_at(self, output: Path) -> int:
        """Cells that are done."""
        return sum((output / name / "DONE").exists() for name in self.cells(output))

    def kept(self, output: Path) -> bytes:
        return str(self.resumes_at(output)).encode()

    def keeps(self, output: Path, before: bytes) -> bool:
        """No cell is trained to its end twice."""
        rows = [json.loads(line) for line in (output / "attempts.jsonl").read_text(encoding="utf-8").splitlines()]
        ends = [row["cell"] for row in rows if row["event"] == "end" and row["outcome"] == "done"]
        return len(ends) == len(set(ends)) and len(ends) >= int(before or 0)

    def results(self, output: Path) -> dict[str, bytes]:
        files = {}
        for name in self.cells(output):
            run = RunDir(output / name)
            files |= {f"{name}/{file}": data for file, data in whole_files(run.final).items()}
            files[f"{name}/steps"] = json.dumps([json.loads(line)["step"] for line in metric_lines(run)]).encode()
        return files


def prose(seed: int) -> str:
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choice(WORDS) for _ in range(80)) + "." for _ in range(60))


KINDS = {"training": Training, "evaluation": Evaluation, "sweep": TwoCells}
