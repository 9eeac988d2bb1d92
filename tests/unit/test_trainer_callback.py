"""What the callback of `enable()` refuses, what it reads for the governor, and how it stops a Trainer."""

import random
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from ds_stability.config import StabilityConfig
from ds_stability.errors import StabilityConfigError
from ds_stability.integrations import transformers as integration
from ds_stability.integrations.logs import shorten_printed
from ds_stability.integrations.transformers import StabilityCallback


def stopping_callback():
    """A callback whose alarm has just said stop."""
    alarm = SimpleNamespace(stop=True, check=lambda step, values: {})
    probe = SimpleNamespace(due=lambda step: True, run=lambda step: {"probe/sample/entropy": 1.0})
    stability = SimpleNamespace(probe=probe, alarm=alarm, recorder=None, restart_clock=lambda: None, applied_steps=5)
    callback = StabilityCallback()
    callback.engine = SimpleNamespace(stability=stability)
    return callback


@pytest.mark.parametrize("strategy", [SaveStrategy.BEST, SaveStrategy.STEPS])
def test_a_stop_by_the_alarm_keeps_its_checkpoint(strategy):
    """Trainer evaluates before it saves, and with the strategy "best" saves only what is best then."""
    callback, control = stopping_callback(), TrainerControl(should_evaluate=True)
    args = SimpleNamespace(save_strategy=strategy)
    callback.on_step_end(args, SimpleNamespace(global_step=5, max_steps=9, is_world_process_zero=True), control)
    assert control.should_save and control.should_training_stop
    assert control.should_evaluate == (strategy != SaveStrategy.BEST)
    control.should_evaluate = control.should_save = True  # as the default callback does at the end of an epoch
    callback.on_epoch_end(args, None, control)
    assert not control.should_evaluate and not control.should_save


def test_an_alarm_in_the_last_step_leaves_the_end_to_the_trainer():
    callback, control = stopping_callback(), TrainerControl(should_evaluate=True)
    callback.on_step_end(SimpleNamespace(save_strategy=SaveStrategy.BEST), SimpleNamespace(global_step=9, max_steps=9), control)
    callback.on_epoch_end(None, None, control)
    assert control.should_evaluate and not control.should_save


# ---- held-out rows ----------------------------------------------------------------------------------------------------

ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "text": f"row {i}"} for i in range(3)]


def tensors_only(rows):
    """A collator that chokes on text, as transformers' own do, and draws random numbers."""
    random.random(), torch.rand(1)
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model, args, tensors_only)
    monkeypatch.setattr(integration, "_training", [lambda: trainer])
    return trainer


@pytest.mark.parametrize("rows", [ROWS, datasets.Dataset.from_list(ROWS), {"one": ROWS}], ids=["list", "dataset", "named"])
def test_held_out_rows_are_those_of_an_evaluation(trainer, rows):
    trainer.eval_dataset = rows
    before = random.getstate(), torch.get_rng_state()
    batches = integration._held_out(2)
    assert [set(batch) for batch in batches] == [{"input_ids", "labels"}] * 2
    assert batches[0]["labels"].tolist() == [[1, 2, 3]]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_a_collator_that_fails_is_one_line(trainer):
    trainer.eval_dataset = [{"input_ids": "words", "labels": "words"}]
    with pytest.raises(StabilityConfigError, match=r"a row of the trainer's eval_dataset fails in the data collator \(ValueError: "):
        integration._held_out(2)
    trainer.eval_dataset = None
    with pytest.raises(StabilityConfigError, match="the trainer has no eval_dataset"):
        integration._held_out(2)


# ---- blocks -------------------------------------------------------------------------------------------------------------

OWN_TEXT = {"objective": {"name": "unlikelihood_sequence", "max_new_tokens": 4}}
WAITING = {"controller": {"mode": "governor", "start": "alarm"}}


@pytest.mark.parametrize("block, average, words", [
    (OWN_TEXT, False, "--average_tokens_across_devices False is not allowed"),
    (OWN_TEXT, True, ""),
    ({}, False, ""),
    (WAITING, True, 'stability.controller.start: "alarm" is not allowed with stability.alarm.action "off"'),
    ({**WAITING, "alarm": {"action": "warn"}, "probe": {"interval": 5}}, True, 'with stability.alarm.action "warn"'),
    ({**WAITING, "alarm": {"action": "govern"}, "probe": {"interval": 5}}, True, ""),
])  # fmt: skip
def test_what_cannot_work_in_a_trainer_is_refused(block, average, words):
    args = SimpleNamespace(average_tokens_across_devices=average, deepspeed={"stability": block}, label_smoothing_factor=0.0,
                           use_liger_kernel=False, liger_kernel_config=None)  # fmt: skip
    if not words:
        StabilityCallback().on_init_end(args, None, None)
        return
    with pytest.raises(StabilityConfigError, match=words):
        StabilityCallback().on_init_end(args, None, None)
    assert StabilityConfig.parse(block)  # a loop of one's own may have it


def test_kernels_that_cannot_run_here_are_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("ds_stability.loss_kernel.importlib.util.find_spec", lambda name: None)
    args = SimpleNamespace(deepspeed={"stability": {"level": 0.5, "loss_kernel": "triton"}}, average_tokens_across_devices=True)
    with pytest.raises(StabilityConfigError, match=r"pip install 'ds_stability\[triton\]'"):
        StabilityCallback().on_init_end(args, None, None)


# ---- what is logged ---------------------------------------------------------------------------------------------------


class Heard(transformers.TrainerCallback):
    """A logger of the user's."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs = dict(logs)


def test_loggers_get_all_tags_wherever_they_stand_and_the_terminal_gets_few(capsys):
    printer, late = PrinterCallback(), Heard()
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[printer, late]))
    for _ in range(2):
        shorten_printed(trainer)
    logs = {"loss": 2.5, "stability/entropy": 1.23456, "stability/mu": 3.0, "step_seconds": 0.5}
    state = SimpleNamespace(is_local_process_zero=True)
    for callback in trainer.callback_handler.callbacks:
        callback.on_log(None, state, None, logs=logs)
    assert late.logs == logs
    printed = capsys.readouterr().out
    assert "'entropy': '1.235'" in printed and "loss" in printed and "mu" not in printed and "seconds" not in printed


def test_a_trainer_with_a_train_of_its_own_is_recorded(tmp_path, monkeypatch):
    """Such a `train` does not tell which trainer it is of."""
    stability = Mock(config=StabilityConfig().resolve(pretrained=False), loss=None, listeners=[], recorder=None, begun_anew=None)
    monkeypatch.setattr(integration.stability_engine, "engine_of", lambda model: SimpleNamespace(stability=stability))
    monkeypatch.setattr(integration, "agree", lambda function: function())
    monkeypatch.setattr(integration.dist, "get_rank", lambda: 0)
    StabilityCallback().on_train_begin(TrainingArguments(tmp_path, report_to=[], use_cpu=True), SimpleNamespace(global_step=0, max_steps=3), None)
    assert stability.recorder.path == tmp_path / "metrics.jsonl"
    stability.recorder.close()
