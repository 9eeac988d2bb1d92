"""Plain-torch replay of a training of train_worker.py: no deepspeed in this process, the whole global batch at once.

Usage: python reference_worker.py SPECS.json OUT.pt. SPECS is {name: {"run": RUN, "world": W, "metrics": [...], "levels":
{...}}}; the controller's
settings (gain, mu, sigma, mean weight) are taken from the recorded metrics, everything else is computed anew from the
formulas of the design, in the most direct way.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from objectives_reference import objective_loss, own_text_batch, own_text_loss


def batches(run, step, world):
    from train_data import micro_batches

    return [pair for rank in range(world) for pair in micro_batches(run, step, rank, world)]


def token_losses(logits, labels, run, coefficient):
    """(surprisal, objective) of the supervised tokens, by the formulas."""
    kind = run.get("regularization_kind")
    logits, labels = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    keep = labels != -100
    logits, labels = logits[keep], labels[keep]
    log_p = F.log_softmax(logits, dim=-1)
    surprisal = -log_p[torch.arange(len(labels)), labels]
    objective = surprisal
    if kind == "z_loss":
        objective = surprisal + coefficient * torch.logsumexp(logits, -1) ** 2
    if kind == "label_smoothing":
        objective = (1 - coefficient) * surprisal + coefficient * (-log_p.mean(dim=-1))
    return surprisal, objective


def total_loss(model, run, step, world, setting):
    if step in run.get("own_text_steps", ()):
        return own_text_loss(model, [own_text_batch(model, run, ids) for ids, _ in batches(run, step, world)], run)
    surprisals, objectives = [], []
    for ids, labels in batches(run, step, world):
        logits = model(input_ids=ids).logits.float()
        s, o = token_losses(logits, labels, run, setting["coefficient"])
        if run.get("objective"):
            o = objective_loss(run, ids, labels, logits)
        surprisals.append(s)
        objectives.append(o)
    s, o = torch.cat(surprisals), torch.cat(objectives)
    z = ((s.detach() - setting["mu"]) / setting["sigma"]).clamp(-3, 3)
    weight = torch.exp(-setting["gain"] * z) / setting["mean_weight"]
    return (weight * o).sum() / len(s)


class Reference:
    def __init__(self, run, model):
        self.run, self.model = run, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=run["lr"], weight_decay=0.01)
        self.initial = [p.detach().clone() for p in model.parameters()]
        self.means = [torch.zeros_like(p) for p in model.parameters()]
        self.log_norms, self.weight = [], 0.0

    def threshold(self, level):
        """mu + k sigma of the raw log norms so far, by the EMA formula written out as weighted sums."""
        if level <= 0 or len(self.log_norms) < max(self.run["warmup"], 2):
            return math.inf
        n = len(self.log_norms)
        weights = [0.97 ** (n - 1 - i) * 0.03 / (1 - 0.97**n) for i in range(n)]
        mean = sum(w * x for w, x in zip(weights, self.log_norms, strict=True))
        var = sum(w * x * x for w, x in zip(weights, self.log_norms, strict=True)) - mean**2
        return math.exp(mean + (4 * (1 - level) / level - 4 * level) * math.sqrt(max(var, 0.0)))

    def step(self, step, world, setting, levels):
        loss = total_loss(self.model, self.run, step, world, setting)
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        clip = min(self.run["clip"], self.threshold(levels["clipping"]))
        scale = 1.0 / max(1.0, (norm + 1e-6) / clip)
        self.log_norms.append(math.log(norm))
        beta = 0.99 * levels["averaging"]
        self.weight = beta * self.weight + 1 - beta
        with torch.no_grad():
            for p, g, m, start in zip(self.model.parameters(), gradients, self.means, self.initial, strict=True):
                m.mul_(beta).add_((1 - beta) * scale * g)
                p.grad = m / self.weight
                if self.run.get("regularization_kind") == "init_decay":
                    p -= self.run["lr"] * setting["coefficient"] * (p - start)
        self.optimizer.step()
        return norm, clip


def replay(spec):
    from train_data import build_model

    run = spec["run"]
    reference = Reference(run, build_model(run))
    rows = []
    for step, row in enumerate(spec["metrics"]):
        setting = {key: row[f"stability/{key}"] for key in ("gain", "mu", "sigma", "mean_weight")}
        setting |= {"coefficient": row.get("stability/regularization_coefficient") or 0.0}
        if setting["mu"] is None:
            setting |= {"mu": 0.0, "sigma": 1.0}
        rows.append(reference.step(step, spec["world"], setting, spec["levels"]))
    names = [name for name, _ in reference.model.named_parameters()]
    weights = {name: p.detach() for name, p in reference.model.named_parameters()}
    return {"weights": weights, "initial": dict(zip(names, reference.initial, strict=True)), "rows": rows}


def main():
    specs = json.loads(Path(sys.argv[1]).read_text())
    torch.save({name: replay(spec) for name, spec in specs.items()}, sys.argv[2])


if __name__ == "__main__":
    main()
