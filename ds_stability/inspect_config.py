"""What `ds-stability inspect` reports about a DeepSpeed JSON: the resolved block, the loss path, warnings.

No torch, unless the file asks for fp16: then DeepSpeed's accelerator is asked whether it has that.
"""

import contextlib
import importlib.util
import io
from dataclasses import asdict, dataclass
from typing import Any

from ds_stability.config import BLOCK, REGULARIZATION_MAX, StabilityConfig, describe, split_config, unsupported
from ds_stability.config_errors import one_line, show_value
from ds_stability.deepspeed_config import (
    AUTO_KEYS,
    REMOVED_KEYS,
    find_auto,
    is_plain_json,
    load_ds_config,
    offload_devices,
    precision,
    section,
    unknown_keys,
    uses_deepspeed_cpu_adam,
    zero_stage,
)
from ds_stability.effect import outlooks
from ds_stability.errors import StabilityConfigError
from ds_stability.inspect_script import calls_ds_stability
from ds_stability.loss_kernel import missing_package
from ds_stability.precision_support import missing_precision
from ds_stability.schedule import format_level, max_level, parse_level_flag

ABSENT_CLIPPING = "absent, so 1.0"


@dataclass(frozen=True)
class KeyReport:
    """One key of the block: its value, and where that comes from ("file", "flag" or "default") with a remark."""

    path: str
    value: Any
    origin: str
    remark: str = ""


@dataclass(frozen=True)
class Inspection:
    """All that is known about a config before a model is. `auto`: key paths that are left to transformers' Trainer; `acts`: from
    which step on each part acts."""

    file: str
    keys: list[KeyReport]
    loss_path: str
    loss_path_reason: str
    zero_stage: int | None
    precision: str
    offload: dict[str, str]
    gradient_clipping: float | str
    auto: list[str]
    acts: list[str]
    warnings: list[str]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_config(path: str, level_flag: str | None = None, script: str | None = None) -> Inspection:
    """Read and check a DeepSpeed JSON, and whether `script` would read its block.

    Raises:
        StabilityConfigError: also for features that do not work with us. UserError: the script cannot be read.
    """
    ds_config = load_ds_config(path)
    rest, stability = split_config(ds_config)
    if level_flag is not None:
        stability = stability.with_level(parse_level_flag(level_flag))
    problems = unsupported(rest, stability)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise StabilityConfigError(problems[0] + more)
    auto = find_auto(rest)
    unread = [] if script is None or calls_ds_stability(script) else [
        f"{one_line(script, 200)} calls neither enable() nor initialize() of ds_stability, so this block is ignored there: plain DeepSpeed "
        "passes over keys that it does not know"
    ]  # fmt: skip
    strict = [] if is_plain_json(path) else [
        "not plain JSON (comments, a trailing comma): DeepSpeed and ds_stability read it, transformers' Trainer does not"
    ]  # fmt: skip
    return Inspection(
        file=str(path),
        keys=_key_reports(stability, ds_config.get(BLOCK, {}), level_flag is not None),
        loss_path=stability.resolved_loss_path,
        loss_path_reason=_loss_path_reason(stability),
        zero_stage=zero_stage(rest),
        precision=precision(rest),
        offload=offload_devices(rest),
        gradient_clipping=_number_or_text(rest.get("gradient_clipping", ABSENT_CLIPPING)),
        auto=auto,
        acts=outlooks(stability),
        warnings=unread + strict + _deepspeed_warnings(rest, auto) + _block_warnings(stability, BLOCK in ds_config),
        fingerprint=stability.fingerprint(),
    )


def _key_reports(stability: StabilityConfig, given: dict[str, Any], flagged: bool) -> list[KeyReport]:
    families = {name: config.model_dump(mode="json") for name, config in stability.families.items()}
    values = {**stability.to_dict(), "stabilizers": families}
    reports = []
    for info in describe():
        section_name, kind, rest = info.path.partition("(")
        if kind and not rest.startswith(f"{values[section_name]['name']})"):
            continue  # a key of another kind of objective
        path = section_name + rest.partition(")")[2] if kind else info.path
        parts = path.split(".")
        absent = parts[0] == "stabilizers" and (parts[1] not in families if len(parts) > 1 else bool(families))
        null = values[parts[0]] is None  # an optional section: one row says so
        if absent or (null and len(parts) > 1) or (info.section and info.path != "stabilizers" and not null):
            continue
        value: Any = values
        for part in parts:
            value = value[part]
        origin = "file" if parts[-1] in section(given, *parts[:-1]) else "default"
        origin = "flag" if flagged and info.path == "level" else origin
        reports.append(KeyReport(path, value, origin, _remark(info.path, value, stability)))
    return reports


def _remark(path: str, value: Any, stability: StabilityConfig) -> str:
    """What a null stands for."""
    if value is not None:
        return ""
    family = path.split(".")[1] if path.startswith("stabilizers.") else ""
    if path.endswith(".level"):
        return f"the block's level, {format_level(stability.family_schedule(family))}"
    if path == "stabilizers.regularization.max":
        return str(REGULARIZATION_MAX[stability.families[family].kind])
    if path == "loss_path":
        return stability.resolved_loss_path
    meanings = {info.path: info.meaning for info in describe()}
    return meanings[path].partition("null = ")[2]


def _number_or_text(value: Any) -> float | str:
    """A finite number as it is, text as it is, anything else as one line of text: what JSON can hold."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return value if number or value == ABSENT_CLIPPING else show_value(value)


def _loss_path_reason(stability: StabilityConfig) -> str:
    if stability.loss_path is not None:
        return "as the block asks"
    if stability.governed:
        return f"the governor of {stability.controller.statistic} acts through it"
    levels = [f"{name} up to {stability.max_level(name)}" for name in stability.families if stability.max_level(name)]
    if stability.objective.name != "cross_entropy":
        levels.append(f"objective {stability.objective.name}")
    return ", ".join(levels) if levels else "no stabilizer is ever above level 0"


def _deepspeed_warnings(config: dict[str, Any], auto: list[str]) -> list[str]:
    warnings = []
    if "gradient_clipping" not in config:
        warnings.append("gradient_clipping is absent: DeepSpeed then clips at 1.0; write the number that you want")
    if "zero_optimization" not in config:
        warnings.append("zero_optimization is absent: ZeRO stage 0, and transformers' Trainer refuses the file")
    elif zero_stage(config) is None and "zero_optimization.stage" not in auto:
        given = config["zero_optimization"]
        given = given.get("stage") if isinstance(given, dict) else given
        warnings.append(f"zero_optimization.stage: {show_value(given)} is none of 0, 1, 2, 3")
    for key, guess in unknown_keys(config):
        hint = f'; did you mean "{guess}"?' if guess else ""
        warnings.append(f"{one_line(key, 60)}: unknown top-level key, which DeepSpeed ignores without a word{hint}")
    warnings += [f"{key}: removed from DeepSpeed, which refuses the key" for key in config if key in REMOVED_KEYS]
    warnings += [f'{path}: "auto" is not filled in by anyone; Accelerate will refuse it'
                 for path in auto if path not in AUTO_KEYS]  # fmt: skip
    warnings += _precision_warnings(config)
    if uses_deepspeed_cpu_adam(config):
        warnings.append(
            "DeepSpeedCPUAdam will be used, which does not resume bit-exactly: set optimizer.params.torch_adam to true "
            "or, if the config has no optimizer, zero_force_ds_cpu_optimizer to false"
        )
    return warnings


def _precision_warnings(config: dict[str, Any]) -> list[str]:
    """No error: the file may be for another machine. bf16 is not asked about: that would take seconds of imports for most files."""
    if precision(config) != "fp16" or importlib.util.find_spec("deepspeed") is None:
        return []
    with contextlib.redirect_stdout(io.StringIO()):  # where DeepSpeed's logger tells of the accelerator that it found
        problem = missing_precision(config)
    return [f"{problem}; a run on this machine ends with this line"] if problem else []


def _block_warnings(stability: StabilityConfig, present: bool) -> list[str]:
    if not present and not stability.active:
        return [f'no "{BLOCK}" block: level 0, plain training with statistics']
    missing = missing_package(stability)
    warnings, families = [missing] if missing else [], stability.families
    if max_level(stability.level) > 0 and all(config.level is not None for config in families.values()):
        reason = "every stabilizer has a level of its own" if families else "stabilizers is {}"
        warnings.append(f"{BLOCK}.level {format_level(stability.level)} has no effect: {reason}")
    return warnings


def render(report: Inspection) -> str:
    """The report as text for a terminal."""
    stage = "?" if report.zero_stage is None else report.zero_stage
    offload = ", ".join(f"{name} to {device}" for name, device in report.offload.items() if device != "none") or "none"
    rows = [(key.path, show_value(key.value), _origin_text(key)) for key in report.keys]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [
        one_line(report.file),
        f"  ZeRO stage {stage}, {report.precision}, offload: {offload}, gradient_clipping: {report.gradient_clipping}",
        f"  loss path: {report.loss_path} ({report.loss_path_reason})",
        *_auto_lines(report.auto),
        *(f"  {line}" for line in report.acts),
        "  read by ds_stability.initialize, launchers/train.py, and Trainer scripts that call enable(); plain DeepSpeed ignores the block",
        "",
        BLOCK,
        *(f"  {path:<{widths[0]}}  {value:<{widths[1]}}  {origin}".rstrip() for path, value, origin in rows),
        f"  fingerprint {report.fingerprint}",
    ]
    if report.warnings:
        lines += ["", "warnings", *(f"  {warning}" for warning in report.warnings)]
    return "\n".join(lines)


def _auto_lines(auto: list[str]) -> list[str]:
    """Not a warning: a config for Trainer scripts has such values by design."""
    if not auto:
        return []
    return [f'  "auto", for transformers\' Trainer to fill in (ds_stability.initialize refuses it): {", ".join(auto)}']


def _origin_text(key: KeyReport) -> str:
    origin = {"file": "", "flag": "--stability_level", "default": "default"}[key.origin]
    return f"{origin}: {key.remark}".lstrip(": ") if key.remark else origin
