"""The tables and the figure of docs/scale.md, from docs/results/scale.json, docs/results/soak.json and scale_formulas.py."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
import scale_formulas as formulas
import soak
from scale_formulas import Run, Shape

Result = Mapping[str, Any]
EXAMPLES = {
    "7B on 8 GPUs": (Shape(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocabulary=128_256), Run(ranks=8)),
    "70B on 64 GPUs": (Shape(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocabulary=128_256), Run(ranks=64)),
    "400B on 1,024 GPUs": (Shape(layers=126, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocabulary=128_256), Run(ranks=1024)),
}  # fmt: skip
NODE_BYTES_PER_SECOND = 400e9  # eight links of 400 Gbit/s a node
GPU_FLOPS_PER_SECOND = 400e12  # in practice, not on paper
_MARKED = re.compile(r"(<!-- generated: (scale|soak)_(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def of_row(row: Result) -> tuple[Shape, Run]:
    return Shape(**row["shape"]), Run(**row["run"])


def compared(measured: float | None, formula: float, unit: float = 1e6, digits: int = 3) -> list[str]:
    """Three cells: measured and formula in `unit`, and their ratio."""
    if measured is None:
        return ["-", f"{formula / unit:.{digits}f}", "-"]
    return [f"{measured / unit:.{digits}f}", f"{formula / unit:.{digits}f}", f"{measured / formula:.4f}" if formula else "-"]


def memory_table(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        shape, run = of_row(row)
        between = sum(formulas.held(shape, run).values())
        inside = between + sum(formulas.in_step(shape, run).values())
        rows.append([row["name"], str(row["world_size"]), *compared(row["memory"]["held"], between), *compared(row["memory"]["inside_step"], inside)])
    header = ["model", "ranks", "between steps (MB)", "formula", "ratio", "inside the optimizer (MB)", "formula", "ratio"]
    return common.markdown_table(header, rows)


def activations_table(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        shape, run = of_row(row)
        if run.weight_bytes == 2 and run.ranks == 1:
            parts = formulas.activations(shape, run)
            kept = sum(size for name, size in parts.items() if name != "layer recomputed")
            rows.append([row["name"], *compared(row["saved_activations"], kept)])
    return common.markdown_table(["model", "kept for backward (MB)", "formula", "ratio"], rows)


def gathered_bytes(row: Result) -> float:
    """Bytes a step of the whole tensors that were gathered; the logger counts a rank's part of them."""
    return row["world_size"] * _logged(row, "all_gather_into_tensor")


def scattered_bytes(row: Result) -> float:
    """Bytes a step of the whole tensors that were reduced and scattered, which is what the logger counts."""
    return _logged(row, "reduce_scatter_tensor")


def _logged(row: Result, operation: str) -> float:
    return sum(int(size) * calls for size, calls in row["messages"].get(operation, {}).items())


def wire_table(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        shape, run = of_row(row)
        if run.ranks == 1:
            continue
        parts, ring = formulas.messages(shape, run), sum(formulas.sent_by_rank(shape, run).values())
        gathered = compared(gathered_bytes(row), parts["gathers"] + parts["persistent"])
        rows.append([row["name"], str(run.ranks), *gathered, *compared(scattered_bytes(row), parts["reduce-scatters"]),
                     *compared(row["loopback_per_rank"], formulas.sent_with_gloo(shape, run)), f"{ring / 1e6:.3f}"])  # fmt: skip
    header = ["model", "ranks", "gathered (MB)", "formula", "ratio", "reduce-scattered (MB)", "formula", "ratio",
              "sent by a rank (MB)", "formula for gloo", "ratio", "for rings (NCCL)"]  # fmt: skip
    return common.markdown_table(header, rows)


def stored_table(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        shape, run = of_row(row)
        parts, files = formulas.stored(shape, run), row["stored"]["checkpoint"]
        optimizer = sum(size for name, size in files.items() if name.endswith("optim_states.pt"))
        ours = sum(size for name, size in files.items() if name.startswith("ds_stability_rank"))
        rest = sum(files.values()) - optimizer - ours
        export = sum(size for name, size in row["stored"]["export"].items() if name.endswith(".safetensors"))
        rows.append([row["name"], str(run.ranks), *compared(optimizer, parts["optimizer"]), *compared(ours, parts["ds_stability"]),
                     f"{rest / 1e3:.0f}", *compared(export, parts["export"])])  # fmt: skip
    header = ["model", "ranks", "optimizer (MB)", "12 P", "ratio", "running mean (MB)", "4 P", "ratio", "rest (kB)", "export (MB)", "b P", "ratio"]
    return common.markdown_table(header, rows)


def estimator_table(result: Result) -> str:
    """DeepSpeed's estimate beside what the same state takes here, without our additions and buffers."""
    rows = []
    for row in result["estimator"]:
        shape, run = EXAMPLES.get(row["name"]) or next(of_row(one) for one in result["rows"]
                                                       if one["name"] == row["name"] and one["world_size"] == row["ranks"])  # fmt: skip
        parts = formulas.held(shape, run)
        state = sum(parts[name] for name in ("weights", "gradients", "master", "moments"))
        share = formulas.in_step(shape, run)["fp32 gradient"]
        estimate, layer = row["bytes"] - row["largest_layer"], row["largest_layer"]
        rows.append([row["name"], str(row["ranks"]), size(estimate), size(state), f"{estimate / state:.3f}", size(state + share),
                     f"{estimate / (state + share):.3f}", size(layer)])  # fmt: skip
    header = ["model", "ranks", "estimate: 18 P / N", "state, formula", "ratio", "and the fp32 gradient of a sub-group", "ratio", "estimate's largest layer"]
    return common.markdown_table(header, rows)


def size(value: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def examples_table(result: Result) -> str:
    columns = [example(shape, run) for shape, run in EXAMPLES.values()]
    return common.markdown_table(["", *EXAMPLES], [[name, *(column[name] for column in columns)] for name in columns[0]])


def example(shape: Shape, run: Run) -> dict[str, str]:
    """One column of the worked examples."""
    held, inside, working = formulas.held(shape, run), formulas.in_step(shape, run), formulas.working(shape, run)
    sent, stored = formulas.sent_by_rank(shape, run), formulas.stored(shape, run)
    elements, _ = formulas.gathered(shape, run)
    checkpoint = stored["optimizer"] + stored["ds_stability"]
    node, seconds = formulas.sent_by_node(shape, run), formulas.flops(shape, run) / GPU_FLOPS_PER_SECOND
    even = f"{run.tokens * node / NODE_BYTES_PER_SECOND / seconds:,.0f}"
    return {
        "parameters": f"{shape.parameters / 1e9:.2f} billion",
        "nodes of 8": str(run.nodes),
        "weights + gradients, bf16": size(held["weights"] + held["gradients"]),
        "master + moments, fp32": size(held["master"] + held["moments"]),
        "averaging (ours)": size(held["averaging"]),
        "small whole weights + bucket": size(held["persistent"] + held["bucket"]),
        "high-frequency mask (ours)": size(held["high_frequency"]),
        "**held between steps**": f"**{size(sum(held.values()))}**",
        "inside the optimizer: fp32 gradient": size(inside["fp32 gradient"]),
        "and every 10th step the update meter (ours)": size(inside["update meter"]),
        "inside a micro-batch: gathered weights": size(working["gathered weights"]),
        "kept activations": size(working["kept activations"]),
        "logits and gradient, or a recomputed layer": size(working["head or layer"]),
        "**at its fullest**": f"**{size(formulas.total(shape, run))}**",
        "weights gathered per micro-batch": f"{elements / shape.parameters:.2f} P",
        "sent by a rank per step": size(sum(sent.values())),
        "of it ours": size(sent["ds_stability"]),
        "leaves a node per step": size(node) if node else "nothing",
        "the network's time, at 400 GB/s a node": f"{node / NODE_BYTES_PER_SECOND:.2f} s" if node else "-",
        "the arithmetic's time, at 400 TFLOP/s": f"{seconds:.1f} s",
        "tokens a GPU at which both are equal": even if node else "-",
        "checkpoint, all ranks": size(checkpoint),
        "a rank's share of it": size(checkpoint / run.ranks),
        "16-bit weights that Trainer saves beside it": size(stored["weights beside it"]),
        "export": size(stored["export"]),
    }


def reuse_table(result: Result) -> str:
    """What `stage3_max_reuse_distance` costs and saves in the worked examples."""
    rows = []
    for name, (shape, run) in EXAMPLES.items():
        for distance in sorted({run.max_reuse_distance, max(run.max_reuse_distance, 2 * sum(shape.layer()))}):
            changed = Run(**{**vars(run), "max_reuse_distance": distance})
            elements, most = formulas.gathered(shape, changed)
            rows.append([name, f"{distance:.3g}", f"{elements / shape.parameters:.2f} P", size(sum(formulas.sent_by_rank(shape, changed).values())),
                         size(2 * most)])  # fmt: skip
    return common.markdown_table(["", "stage3_max_reuse_distance", "gathered per micro-batch", "sent by a rank per step", "whole weights at most"], rows)


def provenance_text(result: Result) -> str:
    how = "The ranks had a network of their own." if result["settings"]["own_network"] else "The ranks shared the machine's network: no loopback column."
    return f"{common.provenance(result)} {how}"


def growth_text(result: Result) -> str:
    """How far counted and computed are apart, over all rows."""
    far = []
    for row in result["rows"]:
        shape, run = of_row(row)
        far.append(abs(row["memory"]["held"] / sum(formulas.held(shape, run).values()) - 1))
    return f"Over {len(far)} engines what is held between steps is at most {max(far):.2%} off the formula."


def soak_table(result: Result) -> str:
    return common.markdown_table(*soak.verdict_table(result))


def soak_text(result: Result) -> str:
    files, steps, parts = result["files"], result["steps_done"], Counter()
    for name, number in files["newest_checkpoint"].items():
        kinds = {"optim_states.pt": "master weights and moments", "model.safetensors": "weights beside it"}
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "the rest")
        parts["running mean" if name.startswith("ds_stability_rank") else kind] += number
    checkpoint = ", ".join(f"{kind} {size(number)}" for kind, number in parts.most_common())
    failed = [f"{row['name']}: {row['measured']}, allowed {row['limit']}" for row in result["criteria"] if not row["met"]]
    verdict = f"**Not met: {'; '.join(failed)}.**" if failed else "All criteria are met."
    medians = [1000 * value for value in result["blocks"]["step_seconds"]]
    return (f"{steps:,} steps took {result['seconds'] / 60:.1f} minutes. `metrics.jsonl` has grown by {files['metrics_bytes'] / steps:,.0f} bytes a "
            f"step, `tensorboard/` by {files['tensorboard_bytes'] / steps:,.0f} ({files['points_per_tag']:,} points of each tag). "
            f"Its last checkpoint (fp32): {checkpoint}; `trainer_state.json`, where Trainer keeps its log, is "
            f"{files['newest_checkpoint']['trainer_state.json'] / steps:.0f} bytes of it for each step so far. The median step took {medians[0]:.0f} ms in "
            f"the first block and {medians[-1]:.0f} ms in the last.\n\n{verdict}")  # fmt: skip


TABLES: dict[str, dict[str, Callable[[Result], str]]] = {
    "scale": {"memory": memory_table, "activations": activations_table, "wire": wire_table, "stored": stored_table, "estimator": estimator_table,
              "examples": examples_table, "reuse": reuse_table, "provenance": provenance_text, "growth": growth_text},
    "soak": {"criteria": soak_table, "text": soak_text, "provenance": common.provenance},
}  # fmt: skip


def filled(text: str, results: Path) -> str:
    """The page with every generated part made anew."""

    def made(match: re.Match) -> str:
        path = results / f"{match[2]}.json"
        if not path.exists():
            return f"{match[1]}\nNot measured yet: there is no `{path.name}` among the results files.\n\n{match[4]}"
        return f"{match[1]}\n{TABLES[match[2]][match[3]](json.loads(path.read_text(encoding='utf-8')))}\n\n{match[4]}"

    return _MARKED.sub(made, text)


def draw(results: Path, folder: Path) -> None:
    """Write figures/scale.png and, if the long run is there, figures/soak.png."""
    _draw_scale(json.loads((results / "scale.json").read_text(encoding="utf-8")), folder / "scale.png")
    if (results / "soak.json").exists():
        soak.draw(json.loads((results / "soak.json").read_text(encoding="utf-8")), folder / "soak.png")


RANKS = [2**power for power in range(0, 13)]


def _draw_scale(result: Result, path: Path) -> None:
    import figures

    figure, (memory, wire, disk) = figures._grid(3, columns=3, size=(3.8, 3.0))
    colors = (figures.BLUE, figures.ORANGE, figures.GREEN)
    for (name, (shape, run)), color in zip(EXAMPLES.items(), colors, strict=True):
        runs = [formulas.with_ranks(run, ranks) for ranks in RANKS]
        label = name.split(" on ")[0]
        memory.plot(RANKS, [sum(formulas.held(shape, one).values()) for one in runs], color=color, linewidth=1.4, label=label)
        wire.plot(RANKS[1:], [sum(formulas.sent_by_rank(shape, one).values()) for one in runs[1:]], color=color, linewidth=1.4, label=label)
        memory.plot([run.ranks], [sum(formulas.held(shape, run).values())], "s", color=color, markersize=5)
        wire.plot([run.ranks], [sum(formulas.sent_by_rank(shape, run).values())], "s", color=color, markersize=5)
        disk.plot([shape.parameters], [_checkpoint(shape, run)], "s", color=color, markersize=5)
    plain = [row for row in result["rows"] if row["name"] in ("0.9M bf16", "13M bf16", "28M bf16, sub-groups of 5M")]
    for row in plain:
        shape, run = of_row(row)
        memory.plot([run.ranks], [row["memory"]["held"]], "o", color=figures.GRAY, markersize=4)
        if run.ranks > 1:
            sent = (run.ranks - 1) / run.ranks * (gathered_bytes(row) + scattered_bytes(row))
            wire.plot([run.ranks], [sent], "o", color=figures.GRAY, markersize=4)
        optimizer = sum(size for name, size in row["stored"]["checkpoint"].items())
        disk.plot([shape.parameters], [optimizer], "o", color=figures.GRAY, markersize=4)
    for shape in {of_row(row)[0] for row in plain}:
        run = of_row(plain[0])[1]
        memory.plot(RANKS[:3], [sum(formulas.held(shape, formulas.with_ranks(run, n)).values()) for n in RANKS[:3]], color=figures.GRAY, linewidth=0.8)
    sizes = [5e5, 1e12]
    disk.plot(sizes, [16 * parameters for parameters in sizes], color=figures.GRAY, linewidth=0.8, label="16 P")
    for axis, title, label in ((memory, "held by a rank between steps", "ranks"), (wire, "sent by a rank in a step", "ranks"),
                               (disk, "checkpoint of all ranks", "parameters")):  # fmt: skip
        axis.set(xscale="log", yscale="log")
        axis.set_title(f"{title} (bytes)", fontsize=9, loc="left")
        axis.set_xlabel(label, fontsize=8)
    for axis in (memory, wire):
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1,024"])
    memory.plot([], [], "o-", color=figures.GRAY, markersize=4, linewidth=0.8, label="counted, 0.9M to 28M")
    memory.legend(fontsize=7, frameon=False)
    disk.legend(fontsize=7, frameon=False)
    figures._finish(figure, path, "Formulas (lines; squares: the worked examples) and what was counted (circles)")


def _checkpoint(shape: Shape, run: Run) -> int:
    parts = formulas.stored(shape, run)
    return parts["optimizer"] + parts["ds_stability"]
