"""What every recorded number means. Keys of metrics.jsonl and TensorBoard tags are the same, and are listed here.

Notation: s surprisal -log p(y) of a supervised token, w its weight, H entropy of the next-token distribution, all over
the whole global batch (ranks and micro-batches) of one optimizer step; g the reduced gradient. A value that is unknown
in a step (an empty batch, a statistic that is switched off) is null, never 0.
"""

from typing import NamedTuple


class Tag(NamedTuple):
    unit: str
    formula: str
    source: str  # which module measures it, and the paper where there is one
    meaning: str


#: Prefixes under which any key may be recorded (`eval/` is open: users evaluate what they like).
OPEN_PREFIXES = ("eval/", "probe/")

TAGS: dict[str, Tag] = {
    "step": Tag("steps", "n", "engine", "optimizer steps since the start of the run, skipped ones included"),
    "loss": Tag("nats", "sum(w/wbar * (s - b H)) / D, plus regularization", "loss", "what is optimized; D is the stock loss's divisor, b the entropy bonus"),
    "cross_entropy": Tag("nats", "mean(s)", "loss", "plain, unweighted cross-entropy of the training batch"),
    "learning_rate": Tag("-", "of the first parameter group", "scheduler", "learning rate of this step"),
    "grad_norm": Tag("-", "|g|", "DeepSpeed", "global gradient norm, loss scale divided out, before any clipping"),
    "tokens_per_second": Tag("tokens/s", "tokens / step_seconds", "engine", "supervised tokens per second, all ranks"),
    "step_seconds": Tag("s", "wall clock", "engine", "duration of the optimizer step, all its micro-batches"),
    "skipped": Tag("true", "-", "engine", "only in the line of a skipped step: a number was not finite, nothing was updated"),
    # the dial
    "stability/level": Tag("0..1", "schedule(applied steps)", "schedule", "requested level of the feedback"),
    "stability/gain": Tag("-", "solve(ratio(gain) = target) + trim", "controller", "token weight is exp(-gain z); above 0 damps surprising tokens"),
    "stability/variance_ratio": Tag("-", "Var_w(s) / Var(s)", "statistics", "share of the variance of surprisal that is left in the training signal"),
    "stability/target_ratio": Tag("-", "1 - level", "controller", "what the controller steers the variance ratio to after warm-up"),
    "stability/saturated": Tag("0/1", "no gain <= gain_max reaches the target; governor: |output| = output_limit", "controller", "1 when the level, or the governor's set point, is out of reach"),
    "stability/trim": Tag("-", "kp e + ki sum(e), |trim| <= trim_max", "controller", "correction of the solved gain by the PI loop"),
    "stability/mu": Tag("nats", "EMA E[s]", "controller", "mean with which this step standardizes surprisal"),
    "stability/sigma": Tag("nats", "sqrt(EMA E[s^2] - mu^2)", "controller", "standard deviation with which this step standardizes surprisal"),
    "stability/mean_weight": Tag("-", "wbar = E[w] over the smoothed histogram", "controller", "predicted mean token weight, which the weights are divided by"),
    "stability/realized_weight": Tag("-", "mean(w) / wbar", "statistics", "1 where the prediction held; above 2 the step's gradient, and `loss`, are scaled back to 2"),
    "stability/windowed_variance_ratio": Tag("-", "Var_w(s) / Var(s) over the last 512 tokens or the last step, whichever are more", "controller", "what the trim was set by, from the steps before; of fewer tokens alone, as in variance_ratio, the ratio comes out too high"),
    # the governor, in place of level, target_ratio and trim
    "stability/governor_statistic": Tag("nats or 0..1", "mean(H), mean(max p) or the high-frequency mass, unweighted", "governor", "the last measurement before this step, on the held-out probe or the training step; what the governor holds"),
    "stability/governor_target": Tag("nats or 0..1", "the number, the untouched model's value, or the probe's cross-entropy", "governor", "where the set point ends"),
    "stability/governor_setpoint": Tag("nats or 0..1", "from the value at the end of warm-up to the target in setpoint_ramp_steps", "governor", "set point in force in this step"),
    "stability/governor_error": Tag("nats or 0..1", "set point - statistic", "governor", "what the governor works on, before the dead band"),
    "stability/governor_output": Tag("-", "follows kp e + I by slew_rate, |output| <= output_limit", "governor", "above 0 spreads the distribution: gain = -output, or entropy bonus = output / 2"),
    "stability/governor_integral": Tag("-", "I = ki sum(e), still at a limit", "governor", "integral part of the governor's output"),
    "stability/entropy_bonus": Tag("-", "b in the objective s - b H", "governor", "coefficient of the entropy bonus; below 0 a penalty"),
    # the meter
    "stability/surprisal": Tag("nats", "mean(s)", "loss", "mean surprisal of the training tokens"),
    "stability/surprisal_variance": Tag("nats^2", "E[s^2] - E[s]^2", "statistics", "variance of surprisal"),
    "stability/weighted_surprisal_variance": Tag("nats^2", "E_w[s^2] - E_w[s]^2", "statistics", "variance of surprisal under the token weights"),
    "stability/effective_tokens": Tag("0..1", "sum(w)^2 / (n sum(w^2)); Kish 1965", "statistics", "share of the tokens that the weights leave effective"),
    "stability/entropy": Tag("nats", "mean(H)", "loss", "predictive entropy on the training batch, teacher-forced"),
    "stability/top1_mass": Tag("0..1", "mean(max p)", "loss", "probability of the likeliest token"),
    "stability/log_partition": Tag("nats", "mean(logsumexp(logits))", "loss", "log of the softmax normalizer; drifts where z-loss would hold it"),
    "stability/high_frequency_mass": Tag("0..1", "mean(sum of p over the high-frequency set)", "loss", "mass on the tokens that make up half of the training corpus"),
    "stability/tokens": Tag("tokens", "n", "loss", "supervised tokens in the global batch"),
    # gradients
    "stability/grad_norm_clipped": Tag("-", "min(|g|, threshold)", "gradients", "global gradient norm after clipping"),
    "stability/clip_threshold": Tag("-", "exp(mu_n + k sigma_n)", "clipping; in spirit ZClip, arXiv 2504.02507", "adaptive norm above which the gradient is scaled down; gradient_clipping applies beside it"),
    "stability/clipped": Tag("0/1", "|g| > threshold", "clipping", "1 when this step was clipped"),
    "stability/gradient_noise_scale": Tag("tokens", "tr(Sigma) / |G|^2", "measures; McCandlish et al. 2018, arXiv 1812.06162, appendix A", "batch size at which noise and signal of the gradient are equal"),
    "stability/gradient_cosine": Tag("-1..1", "dot(g, m) / (|g| |m|)", "gradients", "cosine of the gradient with the running mean that averaging keeps"),
    "stability/update_ratio": Tag("-", "|new - old weights| / |old weights|", "gradients", "relative size of the previous measured update"),
    # stability itself, measured apart from the law
    "stability/loss_deviation": Tag("nats", "sd of cross_entropy, last 50 applied steps", "measures", "how smooth the loss curve is"),
    "stability/log_grad_norm_deviation": Tag("-", "sd of ln|g|, last 50 applied steps", "measures", "how smooth the gradient norm is"),
    "stability/loss_spikes": Tag("count", "cross_entropy > mean + 5 sd of the last 50", "measures", "spikes of the loss since the start"),
    "stability/grad_norm_spikes": Tag("count", "ln|g| > mean + 5 sd of the last 50", "measures", "spikes of the gradient norm since the start"),
    "stability/skipped_steps": Tag("count", "-", "engine", "steps skipped since the start"),
    "stability/loss_scale": Tag("-", "-", "DeepSpeed", "loss scale; fp16 only"),
    # the other stabilizers
    "stability/clipping_level": Tag("0..1", "schedule(applied steps)", "clipping", "requested level of the clipping"),
    "stability/averaging_beta": Tag("-", ".99 level", "averaging", "decay of the running mean of gradients"),
    "stability/weight_average_decay": Tag("0..1", "min(decay, (1 + t)/(10 + t)), t steps in the average", "weight_average; Morales-Brotons et al. 2024, arXiv 2411.18704", "decay of the average of the weights in this step; 0 before it begins"),
    "stability/regularization_coefficient": Tag("-", "level^2 max", "regularization", "coefficient of the regularizer"),
}  # fmt: skip

_PROBE = {
    "entropy": Tag("nats", "mean(H) along the generated tokens", "probe", "generation entropy: of the model on its own text"),
    "seq_rep_4": Tag("0..1", "mean over texts of 1 - distinct/all 4-grams", "probe; Welleck et al. 2020, arXiv 1908.04319", "repetition inside a text"),
    "distinct_2": Tag("0..1", "distinct/all bigrams, pooled, never across texts", "probe; Li et al. 2016, arXiv 1510.03055", "diversity over the prompts; compare at equal token counts only"),
    "high_frequency_share": Tag("0..1", "tokens in the high-frequency set / tokens", "probe", "natural text is at .5 by construction; specials excluded"),
    "end_rate": Tag("0..1", "texts that ended by an end token / texts", "probe", "the others ran into max_new_tokens"),
}  # fmt: skip
_ALARMS = {
    "eos_masked": "the end token is never a label",
    "no_document_ends": "the training tokens hold no end token",
    "padding_supervised": "far more end tokens among the labels than the text has",
    "collapse": "the samples are too sure, too repetitive or too common",
    "spread": "the samples are less certain than the reference text",
}
_EVALUATED = ("surprisal_variance", "entropy", "top1_mass", "log_partition", "high_frequency_mass", "tokens")
_DECODINGS = {"sample": "pure sampling at temperature 1", "greedy": "greedy decoding"}

TAGS["eval/averaged"] = Tag("0/1", "-", "engine", "only with stability.ema: 1 where this line's evaluation was of the average of the weights")
TAGS["eval/cross_entropy"] = Tag("nats", "mean(s)", "loss", "plain cross-entropy of held-out text")
for _name in _EVALUATED:
    TAGS[f"eval/{_name}"] = TAGS[f"stability/{_name}"]._replace(meaning=f"as stability/{_name}, over all held-out text")
for _decoding, _words in _DECODINGS.items():
    for _name, _tag in _PROBE.items():
        TAGS[f"probe/{_decoding}/{_name}"] = _tag._replace(meaning=f"{_tag.meaning} ({_words})")
for _name, _words in _ALARMS.items():
    TAGS[f"alarm/{_name}"] = Tag("0/1", "decision table of alarm.py, with patience", "alarm", f"1 while the alarm holds: {_words}")
TAGS["alarm/reference_cross_entropy"] = Tag("nats", "mean(s)", "alarm", "of the model on pieces of the reference text")
TAGS["alarm/reference_entropy"] = Tag("nats", "mean(H)", "alarm", "predictive entropy of the model on the same pieces")


def is_known(key: str) -> bool:
    return key in TAGS or key.startswith(OPEN_PREFIXES)


def tag_table_markdown() -> str:
    """The table of the docs, one row per key."""
    rows = [("key", "unit", "formula", "measured by", "meaning"), ("---",) * 5]
    rows += [(f"`{key}`", tag.unit, tag.formula, tag.source, tag.meaning) for key, tag in TAGS.items()]
    # A bar would end the cell, also inside code spans.
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n" for row in rows)
