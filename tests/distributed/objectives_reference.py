"""The objectives in plain torch, position by position, for the replay in reference_worker.py."""

import torch
import torch.nn.functional as F


def objective_loss(run, ids, labels, logits):
    """Per supervised token of one micro-batch, in order."""
    config, losses = run["objective"], []
    reference = reference_logits(run, ids) if config["name"] == "reverse_kl" else None
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            if labels[b, t + 1] != -100:
                other = reference[b, t] if reference is not None else None
                losses.append(token_loss(config, logits[b, t], int(labels[b, t + 1]), ids[b, : t + 1].tolist(), other))
    return torch.stack(losses) if losses else logits.new_zeros(0)


def token_loss(config, z, y, before, reference):
    log_p, p = z.log_softmax(-1), z.softmax(-1)
    ce = -log_p[y]
    match config["name"]:
        case "tofu":
            g, beta = config["gamma"], config["beta"]
            factor = (1 - p[y]) ** g - g * p[y] * (1 - p[y]) ** (g - 1) * log_p[y]
            return -factor.detach() * beta * (z / beta).log_softmax(-1)[y]
        case "gem":
            return ((z / config["beta"]).softmax(-1).detach() * (log_p - log_p[y])).sum()
        case "unlikelihood_token":
            return ce - config["alpha"] * sum(torch.log(1 - p[c]) for c in set(before) - {y})
        case "unlikelihood_sequence":  # a step on data
            return ce
        case "reverse_kl":
            return config["cross_entropy"] * ce + config["coefficient"] * (p * (log_p - reference.log_softmax(-1))).sum()


_REFERENCES = {}


def reference_logits(run, ids):
    from transformers import AutoModelForCausalLM

    path = run["objective"]["reference"]
    if path not in _REFERENCES:
        _REFERENCES[path] = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        return _REFERENCES[path](input_ids=ids).logits


def own_text_batch(model, run, ids):
    """The prefixes and the model's own greedy continuations, decoded without a cache."""
    text = ids[:, : run["objective"]["prefix_tokens"]]
    with torch.no_grad():
        for _ in range(run["objective"]["max_new_tokens"]):
            text = torch.cat([text, model(input_ids=text).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return text


def own_text_loss(model, texts, run):
    """-log(1 - p) of the generated tokens that lie in an n-gram seen before, over all generated tokens."""
    n, prefix, total, count = run["objective"]["n"], run["objective"]["prefix_tokens"], 0.0, 0
    for text in texts:
        log_p = model(input_ids=text).logits.float().log_softmax(-1)
        for b, tokens in enumerate(text.tolist()):
            made = tokens[prefix:]
            for k in range(len(made)):
                count += 1
                grams = [range(i, i + n) for i in range(max(0, k - n + 1), min(k, len(made) - n) + 1)]
                if any(made[g.start : g.stop] in [made[j : j + n] for j in range(g.start)] for g in grams):
                    total = total - torch.log1p(-F.softmax(log_p[b, prefix + k - 1], -1)[made[k]])
    return total / count
