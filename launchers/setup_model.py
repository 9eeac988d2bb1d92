"""Config, tokenizer and model of a training run, from the checked command line."""

import os
from typing import Any

import torch

from ds_stability.data.chat_end import end_ids
from ds_stability.data.packing import check_block_size, check_vocabulary
from ds_stability.data.readers import read_documents
from ds_stability.data.tokenizer import load_pretrained, train_bpe
from ds_stability.errors import UserError
from ds_stability.launchers.arguments import Command, TrainArguments
from ds_stability.merging import unsuitable_layers
from ds_stability.weights import check_names, load_causal_lm


def load_config(command: Command) -> Any:
    """The model's config, pretrained or fresh, checked against --block_size. No weights are read."""
    from transformers import AutoConfig

    arguments = command.model
    name, flag = arguments.model_name_or_path, "model_name_or_path"
    if name is None:
        name, flag = arguments.config_name, "config_name"
    try:
        config = AutoConfig.from_pretrained(
            name, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
        )
    except Exception as error:  # the readers of a foreign folder raise whatever they stumble over
        raise UserError(f"--{flag} {name}: no model config could be loaded ({_first_line(error)})") from None
    _override(config, arguments.config_overrides)
    check_block_size(command.data.block_size, config)
    return config


def load_tokenizer(command: Command, config: Any) -> tuple[Any, Any]:
    """(tokenizer, config). A fresh model without a tokenizer of its own gets one: a BPE trained on the training documents,
    or the synthetic language's words; its config then has that vocabulary."""
    arguments = command.model
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is not None:
        tokenizer = load_pretrained(name, arguments.model_revision, arguments.trust_remote_code)
    elif command.spec.dataset_name == "builtin:synthetic":
        from ds_stability.data.synthetic import SyntheticLanguage

        tokenizer = SyntheticLanguage(command.spec.synthetic_seed).tokenizer()
    else:
        tokenizer = train_bpe(read_documents(command.spec), arguments.vocab_size)
    if arguments.model_name_or_path is None:
        _fit_vocabulary(config, tokenizer)
    check_vocabulary(tokenizer, config)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token, which separates packed documents; pass another "
                        "--tokenizer_name")  # fmt: skip
    return tokenizer, config


def build_model(command: Command, config: Any, tokenizer: Any, args: TrainArguments) -> torch.nn.Module:
    """The model, in the dtype that the engine computes in; weights are partitioned while they load under ZeRO-3."""
    arguments = command.model
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    # transformers ignores the borders of packed documents when it keeps a cache (masking_utils.py).
    keeps_cache, config.get_text_config().use_cache = config.get_text_config().use_cache, False
    options = {"attn_implementation": arguments.attn_implementation, "trust_remote_code": arguments.trust_remote_code}
    if arguments.model_name_or_path is None:
        model = _fresh(arguments, config, dtype, options)
    else:
        model = load_causal_lm(arguments.model_name_or_path, f"--model_name_or_path {arguments.model_name_or_path}", config=config,
                               dtype=dtype, revision=arguments.model_revision, **options)  # fmt: skip
    _prepare_generation(model, tokenizer, keeps_cache)
    return _add_adapter(model, arguments, args) if arguments.use_peft else model


def _prepare_generation(model: Any, tokenizer: Any, keeps_cache: bool) -> None:
    """What is exported generates as its users expect: with a cache, to the end of a turn. The base's other settings stay."""
    settings = model.generation_config
    if keeps_cache and settings.use_cache is False:  # taken over from the training's config, or from an export of one
        settings.use_cache = True
    settings.eos_token_id = end_ids(settings.eos_token_id, tokenizer)


def _fresh(arguments: Any, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise UserError(f"{arguments.config_name}: the model could not be built ({_first_line(error)})") from None


def check_pretrained(command: Command, config: Any) -> None:
    """Refuse pretrained weights that are not the model's, by their names alone: before data is read, and without ranks.

    Raises:
        UserError: see weights.py.
    """
    objective = command.stability.objective
    if objective.name == "reverse_kl":
        check_names(objective.reference, f"stability.objective.reference {objective.reference}")
    name = command.model.model_name_or_path
    if name is None:
        return
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        raise UserError(f"--model_name_or_path {name}: is a PEFT adapter; merge it into its base model first (PeftModel."
                        "from_pretrained(base_model, adapter).merge_and_unload().save_pretrained(folder))")  # fmt: skip
    check_names(name, f"--model_name_or_path {name}", config=config, revision=command.model.model_revision,
                attn_implementation=command.model.attn_implementation,
                trust_remote_code=command.model.trust_remote_code)  # fmt: skip


def _fit_vocabulary(config: Any, tokenizer: Any) -> None:
    text = config.get_text_config()
    text.vocab_size = max(tokenizer.get_vocab().values()) + 1
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, key, getattr(tokenizer, key))


def _override(config: Any, overrides: str | None) -> None:
    for pair in (overrides or "").split(","):
        key, separator, _ = pair.partition("=")
        if pair and (not separator or key not in config.to_dict()):
            raise UserError(f"--config_overrides {pair!r}: allowed are key=value pairs of keys that the config has")
    if overrides:
        try:
            config.update_from_string(overrides)
        except ValueError as error:
            raise UserError(f"--config_overrides {overrides}: {_first_line(error)}") from None


def _add_adapter(model: torch.nn.Module, arguments: Any, args: TrainArguments) -> torch.nn.Module:
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise UserError("--use_peft needs the package peft; install ds_stability[peft]") from None
    targets = arguments.lora_target_modules
    # On routers and on matrices that a kernel reads an adapter does not act: the default leaves them out.
    unfit = [] if targets else [name for name, _ in unsuitable_layers(model)]
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=arguments.lora_r, lora_alpha=arguments.lora_alpha,
                      lora_dropout=arguments.lora_dropout, target_modules=targets or "all-linear",
                      exclude_modules=unfit or None)  # fmt: skip
    if args.gradient_checkpointing or args.activation_checkpointing:
        model.enable_input_require_grads()  # frozen embeddings would cut the graph off at the first checkpoint
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        flags = f"--lora_target_modules {' '.join(targets) if targets else '(all linear layers)'}, --lora_dropout {arguments.lora_dropout}"
        raise UserError(f"{flags}: {_first_line(error)}") from None


def _first_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
