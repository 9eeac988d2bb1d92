"""The command line of launchers/train.py: transformers' TrainingArguments, the model, the data, and the stability level.

`--config recipe.yaml` sets defaults for any flag (as in TRL); what stands on the command line wins. Everything that needs
no data, no network and no process group is checked here, before any of them is touched.
"""

import argparse
import copy
import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from ds_stability.config import StabilityConfig, split_config, unsupported
from ds_stability.config_errors import did_you_mean
from ds_stability.data import DataSpec
from ds_stability.data.tokenizer import MIN_BPE_VOCABULARY
from ds_stability.deepspeed_config import load_ds_config, section
from ds_stability.errors import UserError
from ds_stability.launchers.starting_point import starting_point
from ds_stability.objectives.config import parse_objective_flag
from ds_stability.run_dir import check_output_dir
from ds_stability.safe_read import read_yaml
from ds_stability.schedule import parse_level_flag
from ds_stability.stabilizers.feedback import read_gains


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "folder or hub name of pretrained weights"})
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit of the hub model"})
    config_name: str | None = field(
        default=None, metadata={"help": "config JSON, folder or hub name of a fresh model with random weights"}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "comma-separated key=value changes of the fresh model's config"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "tokenizer folder or hub name; default: the model's, or a BPE trained on the data"}
    )
    vocab_size: int = field(default=1024, metadata={"help": "size of a BPE tokenizer trained on the data"})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})
    use_peft: bool = field(default=False, metadata={"help": "train a LoRA adapter (extra `peft`)"})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank"})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha"})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout"})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "module names; default: all linear"})


@dataclass
class DataArguments:
    train_file: list[str] | None = field(default=None, metadata={"help": ".txt, .jsonl, .json or .parquet files"})
    validation_file: list[str] | None = field(default=None, metadata={"help": "held-out files"})
    dataset_name: str | None = field(
        default=None, metadata={"help": "hub data set, builtin:prose or builtin:synthetic"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the hub data set"})
    dataset_split: str = field(default="train", metadata={"help": "training split of the hub data set"})
    dataset_validation_split: str | None = field(default=None, metadata={"help": "held-out split of the hub data set"})
    dataset_revision: str | None = field(default=None, metadata={"help": "commit of the hub data set"})
    text_field: str = field(default="text", metadata={"help": "field of JSONL or Parquet rows that holds the text"})
    messages_field: str = field(default="messages", metadata={"help": "field that holds chat messages"})
    text_document: str = field(default="file", metadata={"help": "what a document of a text file is: file, paragraph or line"})
    unwrap: bool = field(default=False, metadata={"help": "join hard-wrapped lines of text files into paragraphs"})
    assistant_only_loss: bool = field(default=False, metadata={"help": "chat: train on assistant tokens only"})
    validation_split_percentage: float = field(default=5.0, metadata={"help": "share of documents that is held out"})
    split_seed: int = field(default=0, metadata={"help": "decides what is held out, and draws builtin:synthetic"})
    block_size: int = field(default=512, metadata={"help": "tokens per packed block"})
    packing: str = field(
        default="auto",
        metadata={"help": "pack (documents share blocks), pad (each has rows of its own) or auto: pack if the model keeps them apart"},
    )
    truncation: str = field(
        default="auto",
        metadata={"help": "documents longer than a block: split, drop, keep_start, keep_end or auto: chats dropped, texts split"},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "blocks to train on at most"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "blocks to evaluate on at most"})
    streaming: bool = field(default=False, metadata={"help": "read and pack while training"})
    shuffle_buffer: int = field(default=0, metadata={"help": "blocks in the shuffle buffer of a stream"})
    synthetic_tokens: int = field(default=1_000_000, metadata={"help": "size of builtin:synthetic"})
    data_cache_dir: str | None = field(default=None, metadata={"help": "keep tokens here between runs, memory-mapped"})


@dataclass
class StabilityArguments:
    stability_level: str | None = field(
        default=None, metadata={"help": "level 0..1, or a schedule 0:0,200:0.5 over steps; replaces the block's level"}
    )
    stability_target: str | None = field(
        default=None,
        metadata={"help": "initial, data or a number: the governor's set point; turns the governor on in place of a level"},
    )
    stability_loss_path: str | None = field(
        default=None, metadata={"help": "stock, chunked or linear: the loss path; linear makes a level-0 run match those above 0"}
    )
    stability_objective: str | None = field(
        default=None, metadata={"help": "what is optimized: a name such as gem, or JSON such as {\"name\": \"focal\", \"gamma\": 1}"}
    )
    high_frequency_file: str | None = field(
        default=None, metadata={"help": "high_frequency.json of another run, used as this run's high-frequency set"}
    )


@dataclass
class TrainArguments(TrainingArguments):
    """transformers.TrainingArguments with other defaults: a bounded log, and metrics that ds_stability writes itself."""

    logging_steps: float = field(default=10, metadata={"help": "log every X steps"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "evaluation blocks per device"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide non-finite losses from the log"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "as in transformers; position_ids are needed"})
    branch_from: str | None = field(
        default=None, metadata={"help": "RUN/checkpoint-N of another run, from whose state this one goes on in a folder of its own"}
    )
    log_on_each_node: bool = field(default=False, metadata={"help": "log on every host, not on the first alone"})


@dataclass
class Command:
    """A parsed and checked command line. `training` holds keyword arguments: building TrainingArguments touches devices."""

    model: ModelArguments
    data: DataArguments
    stability: StabilityConfig
    training: dict[str, Any]
    ds_config: dict[str, Any]
    spec: DataSpec
    resume: str | None  # the checkpoint to continue from: the named one, or the newest that seems whole
    resume_mode: str = "false"  # false, true, auto, or path
    trunk: str | None = None  # the checkpoint that the run is a branch of
    config_file: str | None = None

    @property
    def output_dir(self) -> str:
        return self.training["output_dir"]

    @property
    def branches(self) -> bool:
        """Whether the run starts from its trunk's checkpoint, not from one of its own."""
        return self.trunk is not None and self.resume == self.trunk

    @property
    def continues(self) -> bool:
        """Whether the run starts from a checkpoint of its own."""
        return self.resume is not None and not self.branches


class _Parser(HfArgumentParser):
    """argparse with our kind of error: one line, exit code 2, raised as UserError."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def parse_command(argv: list[str]) -> Command:
    """Parse and check a command line of launchers/train.py.

    Raises:
        UserError: a wrong flag, recipe, DeepSpeed config, stability block, model, data file or output directory.
    """
    parser = _make_parser()
    given, recipe = _explicit_flags(parser, argv)
    namespace = vars(parser.parse_args(_recipe_arguments(parser, recipe) + argv))
    split = {kind: {f.name: namespace[f.name] for f in dataclasses.fields(kind) if f.init}
             for kind in (ModelArguments, DataArguments, StabilityArguments, TrainArguments)}  # fmt: skip
    model, data = ModelArguments(**split[ModelArguments]), DataArguments(**split[DataArguments])
    training = split[TrainArguments]
    _check_sources(model)
    ds_config, stability = _load_block(training, StabilityArguments(**split[StabilityArguments]))
    stability = stability.resolve(pretrained=model.model_name_or_path is not None)
    _follow_ds_config(training, ds_config, given | recipe.keys())
    _check_training(training)
    if stability.resolved_loss_path != "stock":
        _check_loss_flags(training)
    spec = _data_spec(data)
    spec.check()
    held_out = spec.validation_files or spec.dataset_validation_split or spec.validation_split_percentage > 0
    if not held_out and str(training["eval_strategy"]) not in ("no", "IntervalStrategy.NO"):
        raise UserError(f"--eval_strategy {training['eval_strategy']} needs held-out data; give --validation_file or a "
                        "--validation_split_percentage above 0, or leave it out")
    if stability.controller.needs_probe and not held_out:
        raise UserError(f"the governor (stability.controller.target {stability.controller.target}, probe_interval "
                        f"{stability.controller.probe_interval}) measures on held-out text; give --validation_file or a "
                        "--validation_split_percentage above 0")  # fmt: skip
    stability.require_starter()
    if training["max_steps"] > 0:  # else the callback does it, when the data is counted
        stability.require_average(training["max_steps"])
    if stability.alarm.action != "off" and stability.alarm.reference_file is None and not held_out:
        raise UserError(f"stability.alarm.action {stability.alarm.action} holds samples against held-out text; give --validation_file, a "
                        "--validation_split_percentage above 0, or stability.alarm.reference_file")  # fmt: skip
    if data.streaming and training["max_steps"] <= 0:
        raise UserError("--streaming has no known length: give --max_steps, the number of optimizer steps to train")
    if data.block_size < 2:
        raise UserError(f"--block_size {data.block_size}: allowed is a number of tokens from 2")
    mode, resume, trunk = starting_point(training)
    check_output_dir(training["output_dir"], resume not in (None, trunk), restart=mode == "auto")
    return Command(model, data, stability, training, ds_config, spec, resume, mode, trunk, namespace["config"])


def _make_parser() -> _Parser:
    parser = _Parser((ModelArguments, DataArguments, StabilityArguments, TrainArguments), allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="YAML file with defaults for any flag")
    return parser


def flag_names() -> list[str]:
    """The names of all flags, as a recipe or a sweep writes them."""
    return sorted(name.removeprefix("--") for name in _make_parser()._option_string_actions if name.startswith("--"))


def _explicit_flags(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[set[str], dict[str, Any]]:
    """Names of the flags in `argv`, and the recipe that `--config` names."""
    actions = parser._option_string_actions
    names = {actions[a.split("=")[0]].dest for a in argv if a.split("=")[0] in actions}
    for index, argument in enumerate(argv):
        if argument == "--config" and index + 1 < len(argv):
            return names, _read_recipe(parser, argv[index + 1])
        if argument.startswith("--config="):
            return names, _read_recipe(parser, argument.split("=", 1)[1])
    return names, {}


def _read_recipe(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    recipe = read_yaml(path, f"--config {path}")
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path}: holds a {type(recipe).__name__}; allowed is a mapping of flags to values")
    known = {action.dest for action in parser._actions} - {"config", "help"}
    for key in recipe:
        if key not in known:
            near = did_you_mean(str(key), sorted(known))
            raise UserError(f"--config {path}: unknown key {key!r}{f'; did you mean {near!r}?' if near else ''}")
    return recipe


def _recipe_arguments(parser: argparse.ArgumentParser, recipe: dict[str, Any]) -> list[str]:
    """The recipe as command-line words, so that both are parsed by the same rules."""
    words: list[str] = []
    for key, value in recipe.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words.append(f"--{key}")
        words += [json.dumps(v, default=str) if isinstance(v, bool | dict) else str(v) for v in values]
    return words


def _check_sources(model: ModelArguments) -> None:
    if (model.model_name_or_path is None) == (model.config_name is None):
        given = "both are given" if model.model_name_or_path else "neither is given"
        raise UserError(f"--model_name_or_path (pretrained weights) or --config_name (a fresh model): {given}; give one")
    for flag, name in (("model_name_or_path", model.model_name_or_path), ("config_name", model.config_name),
                       ("tokenizer_name", model.tokenizer_name)):  # fmt: skip
        # A hub name has the form name or owner/name; anything else can only be a path.
        if name and not os.path.exists(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".json")):
            raise UserError(f"--{flag} {name}: no such file or folder")
    if model.vocab_size < MIN_BPE_VOCABULARY:
        raise UserError(f"--vocab_size {model.vocab_size}: allowed is a size from {MIN_BPE_VOCABULARY} (bytes, special tokens)")
    if model.lora_r < 1:
        raise UserError(f"--lora_r {model.lora_r}: allowed is a rank from 1")
    if model.config_overrides and not model.config_name:
        raise UserError("--config_overrides changes a fresh model's config; it needs --config_name")


def _load_block(training: dict[str, Any], flags: StabilityArguments) -> tuple[dict[str, Any], StabilityConfig]:
    """(DeepSpeed config without the block, the block with the flags applied)."""
    if not training["deepspeed"]:
        raise UserError("--deepspeed is not given; give a DeepSpeed config, for example ds_configs/zero3_bf16.json")
    ds_config, stability = split_config(load_ds_config(training["deepspeed"]))
    if flags.stability_level is not None and flags.stability_target is not None:
        raise UserError(f"--stability_level {flags.stability_level} and --stability_target {flags.stability_target} exclude each "
                        "other: a level concentrates the model, the governor holds it where it is; give one")  # fmt: skip
    if flags.stability_target is not None:
        stability = stability.with_target(flags.stability_target)
    if flags.stability_level is not None:
        stability = stability.with_level(parse_level_flag(flags.stability_level), "--stability_level")
    block = stability.to_dict()
    if flags.stability_loss_path is not None:
        block["loss_path"] = flags.stability_loss_path
    if flags.stability_objective is not None:
        block["objective"] = parse_objective_flag(flags.stability_objective)
    if flags.high_frequency_file is not None:
        block["statistics"]["high_frequency_file"] = flags.high_frequency_file
    stability = StabilityConfig.parse(block)
    problems = unsupported(ds_config, stability)
    if problems:
        raise UserError(problems[0])
    prompts = stability.probe.prompts_file
    if stability.probe.interval > 0 and prompts is not None and not os.path.isfile(prompts):
        raise UserError(f"stability.probe.prompts_file {prompts}: no such file")
    file = stability.statistics.high_frequency_file
    if file is not None and not os.path.isfile(file):
        raise UserError(f"--high_frequency_file {file}: no such file")
    reference = stability.alarm.reference_file
    if stability.alarm.action != "off" and reference is not None and not os.path.isfile(reference):
        raise UserError(f"stability.alarm.reference_file {reference}: no such file")
    feedback = stability.families.get("feedback")
    if feedback is not None and feedback.replay is not None:
        read_gains(feedback.replay)
    return ds_config, stability


def _follow_ds_config(training: dict[str, Any], ds_config: dict[str, Any], given: set[str]) -> None:
    """Where the DeepSpeed config states a value, it sets the flag of the same meaning, unless that flag was given too."""
    precision = {name: section(ds_config, name).get("enabled") for name in ("bf16", "fp16")}
    for name, enabled in precision.items():
        if isinstance(enabled, bool):
            if name in given and bool(training[name]) != enabled:
                raise UserError(f"--{name} {training[name]} and {name}.enabled {enabled} in {training['deepspeed']} disagree")
            training[name] = enabled
    clip = ds_config.get("gradient_clipping")
    if isinstance(clip, int | float):
        if "max_grad_norm" in given and training["max_grad_norm"] != clip:
            raise UserError(f"--max_grad_norm {training['max_grad_norm']} and gradient_clipping {clip} in "
                            f"{training['deepspeed']} disagree; change one of them")  # fmt: skip
        training["max_grad_norm"] = float(clip)


def _check_training(training: dict[str, Any]) -> None:
    for flag, low in (("per_device_train_batch_size", 1), ("per_device_eval_batch_size", 1),
                      ("gradient_accumulation_steps", 1), ("seed", 0)):  # fmt: skip
        if training[flag] < low:
            raise UserError(f"--{flag} {training[flag]}: allowed is an integer from {low}")
    if training["seed"] >= 2**32:
        raise UserError(f"--seed {training['seed']}: allowed is an integer from 0 to {2**32 - 1}")
    for flag in ("learning_rate", "num_train_epochs"):
        if not 0 < float(training[flag]) < float("inf"):
            raise UserError(f"--{flag} {training[flag]}: allowed is a number above 0")
    if training["save_only_model"]:
        raise UserError("--save_only_model True leaves out what a run needs to go on after it was stopped; leave it out (the weights "
                        "alone are written to OUTPUT_DIR/final)")  # fmt: skip
    if not training["output_dir"]:
        raise UserError("--output_dir is not given; give a new or empty folder for this run")


def _check_loss_flags(training: dict[str, Any]) -> None:
    for flag in ("label_smoothing_factor", "use_liger_kernel"):
        if training[flag]:
            raise UserError(f"--{flag} {training[flag]} takes the loss away from the model, where the stability level acts; "
                            "leave it out (smoothing: stability.objective label_smoothing)")  # fmt: skip


def _data_spec(data: DataArguments) -> DataSpec:
    values = dataclasses.asdict(data)
    names = {f.name for f in dataclasses.fields(DataSpec)}
    kwargs = {name: value for name, value in values.items() if name in names}
    return DataSpec(train_files=tuple(data.train_file or ()), validation_files=tuple(data.validation_file or ()),
                    seed=data.split_seed, **kwargs)  # fmt: skip


def trainer_ds_config(command: Command) -> dict[str, Any]:
    """The DeepSpeed config that Trainer gets: a copy, with the block (no null in it is "auto") back in its place."""
    return {**copy.deepcopy(command.ds_config), "stability": command.stability.to_dict()}
