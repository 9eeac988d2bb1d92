"""State and parts of one engine's stability control, and what happens at each optimizer step boundary."""

import logging
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from deepspeed import comm as dist

from ds_stability.causal_model import causal_lm, has_pretrained_weights
from ds_stability.collective import Pace, reduce_tokens, require_equal
from ds_stability.config import StabilityConfig
from ds_stability.console import agree
from ds_stability.controller import Setting
from ds_stability.data.frequency import HighFrequencySet
from ds_stability.effect import Effect
from ds_stability.errors import SkippedStepsError, StabilityConfigError
from ds_stability.gradients import reduced_gradients
from ds_stability.held_out import GovernorProbe
from ds_stability.histogram import NUM_BINS
from ds_stability.install_loss import install_loss
from ds_stability.loss import cross_entropy
from ds_stability.masters import require_masters
from ds_stability.measures import StabilityMeasures
from ds_stability.noise import MicroGradientMeter
from ds_stability.objectives.build import Preparation, refuse_unprepared, token_objective
from ds_stability.optimizer_hooks import OptimizerHooks, UpdateMeter
from ds_stability.same_block import STATE_VERSION, require_same_block, require_version, training_part
from ds_stability.stabilizers.build import NAMES, build_stabilizers
from ds_stability.stabilizers.clipping import bounded_threshold, clip_metrics
from ds_stability.stabilizers.governance import check_target
from ds_stability.statistics import (
    STEP_FIELDS,
    TOKEN_FIELDS,
    StepSums,
    as_metrics,
    gradient_metrics,
    non_finite_fields,
    realized_weight,
    token_metrics,
)
from ds_stability.token_sums import mask_of
from ds_stability.weight_average import WeightAverage

logger = logging.getLogger(__name__)


class Stability:
    """`engine.stability`: the resolved block, the stabilizers, the accumulators and the metrics of the last step.

    Attributes:
        config: the resolved `StabilityConfig`.
        metrics: values of the last optimizer step, by the keys of the tag table; None where undefined.
        stop_wish: whether this rank was asked to stop; called once a step, on every rank.
        stop_requested: whether any rank was asked to, at the last step's end; the same on every rank.
        listeners: called with (step, metrics) after every optimizer step, applied or skipped, on every rank.
        recorder: the run's `Recorder` on rank 0 where an integration made one, else None.
        probe, alarm: the `Probe` that an integration runs at its interval, and the `Alarm` that it asks afterwards, or None.
        preparation: what the objective does before each training micro-batch, or None.
        own_text: whether the coming step trains on generated text: its tokens enter no statistic and have weight 1.
        feedback, governance, clipping, averaging, regularization: the stabilizers; None where absent.
        governor_probe, ema, high_frequency_ids: how the governor measures on held-out text, the average of the weights, the set; or None.
        branching: whether the checkpoint to load is a trunk's, whose block may be another one (takeover.py).
        begun_anew: what of a trunk's state did not fit, in words; None where no trunk was loaded.
    """

    def __init__(self, engine, config: StabilityConfig):
        self.engine = weakref.proxy(engine)
        self.group, self.device = engine.seq_data_parallel_group, torch.device(engine.device)
        require_equal(config.to_dict(), self.device, self.group, "stability block")
        model = causal_lm(engine.module)
        self.config = config.resolve(pretrained=has_pretrained_weights(model))
        self.gradients = reduced_gradients(engine, exact=not self.config.active)
        require_masters(self.config, self.gradients.partitions())
        self.stabilizers = build_stabilizers(self.config, self.device, self.group)
        self.feedback, self.governance, self.clipping, self.averaging, self.regularization = map(self.stabilizers.get, NAMES)
        self.ema = WeightAverage(self.config.ema, self.gradients.partitions) if self.config.ema is not None else None
        self.measures = StabilityMeasures()
        self.meter = UpdateMeter(self.config.statistics.update_ratio_interval, self.device)
        self.hooks = OptimizerHooks(self.gradients, self.averaging, self.regularization, self.meter)
        self.loss = install_loss(engine, model, self.config, self.device, self.group)
        self.preparation, self.own_text = None, False
        if self.loss is not None:
            self.loss.base_objective = self.loss.objective = token_objective(self.config.objective)
        if self.loss is not None and self.config.prepares_batches:
            self.preparation = Preparation(self.config.objective, engine)
        self.governor_probe: GovernorProbe | None = None
        if self.governance is not None:
            check_target(self.config.controller, model.config.get_text_config().vocab_size)
            self.governor_probe = GovernorProbe(self.engine, self.loss, self.governance, self.group, self.device)
        self.high_frequency_ids, self.measured = None, False  # the second: whether the step being closed has token statistics
        self.pace = Pace(self.group, self.config.statistics.interval if self.gradients.norm_is_global else 1)
        self._load_high_frequency(model)
        self.noise = None
        if self.config.statistics.gradient_noise_scale and self.loss is not None:
            self.noise = MicroGradientMeter(engine.module, self.device, engine.seq_dp_world_size if engine.gradient_average else 1)
            self.loss.parts.append(lambda noise=self.noise: noise.listen(False))
        self.applied_steps = self.skipped_steps = self.skipped_in_a_row = 0
        self.metrics, self.effect = {}, Effect(self.config)
        self.stop_wish, self.stop_requested = lambda: False, False
        self.listeners: list[Callable[[int, dict], None]] = []
        self.recorder = self.probe = self.alarm = None
        self.branching, self.begun_anew = False, None
        self.alarm_state: dict | None = None  # of a checkpoint, for the alarm that is still to be made
        self.started = time.perf_counter()
        self._prepare()

    def _load_high_frequency(self, model) -> None:
        path = self.config.statistics.high_frequency_file
        if path is not None and self.loss is not None:
            vocab_size = model.config.get_text_config().vocab_size
            frequent = agree(lambda: HighFrequencySet.load(path, vocab_size))
            self.set_high_frequency(list(frequent.token_ids), vocab_size)

    def set_high_frequency(self, token_ids: list[int], vocab_size: int) -> None:
        """Measure the mass on `token_ids` (the high-frequency set) from now on; `vocab_size` is the width of the logits."""
        self.high_frequency_ids = token_ids
        if self.loss.head is not None:  # a padded head is wider than the vocabulary of the config
            vocab_size = max(vocab_size, self.loss.head.head.out_features)
        self.loss.high_frequency_V = mask_of(token_ids, vocab_size, self.device)

    def set_held_out(self, sequences: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Give the governor the held-out sequences on which it measures; see `held_out.GovernorProbe.set`. Collective."""
        if self.governor_probe is None:
            raise StabilityConfigError('set_held_out is for stability.controller.mode "governor"; this block has none')
        self.governor_probe.set(sequences)

    def start_governor(self) -> None:
        """Let a governor with `controller.start` "alarm" begin. Call it between two steps, on every rank in the same one."""
        if self.governance is None:
            raise StabilityConfigError('start_governor is for stability.controller.mode "governor"; this block has none')
        self.governance.governor.start()

    @property
    def needs_held_out(self) -> bool:
        """Whether a governor waits for `set_held_out`."""
        return self.governor_probe is not None and self.governor_probe.missing

    @property
    def expects_training(self) -> bool:
        """Whether the coming forward is likely to be differentiated."""
        return self.loss.calls.expected if self.loss is not None else self.engine.module.training

    def measure_held_out(self) -> None:
        """Called at every training forward: the governor's measurement, where it is due."""
        if self.governor_probe is not None and self.governor_probe.measure():
            self.governance.prepare(self.applied_steps, self.loss)

    # ---- one optimizer step -------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Fix what the coming step uses: no synchronization is needed in forward."""
        self.meter.prepare(self.applied_steps)
        if self.loss is None:
            return
        self.loss.measure = self.applied_steps % self.config.statistics.interval == 0
        if self.preparation is not None:  # the last micro-batch's objective may hold reference logits
            self.loss.base_objective = self.loss.objective = cross_entropy
        for stabilizer in self.stabilizers.values():
            stabilizer.prepare(self.applied_steps, self.loss)
        self.own_text = self.preparation is not None and self.preparation.on_own_text(self.engine.global_steps)
        self.loss.measure &= not self.own_text
        # The noise scale needs the tokens' statistics; without them its norms, a pass over all gradients, would be for nothing.
        if self.noise is not None:
            self.noise.listen(self.loss.measure)
            self.loss.on_backward = self.noise.start if self.loss.measure else None

    def before_forward(self, inputs: dict) -> dict:
        """The keyword arguments with which a forward is to run that can be differentiated; called with those that it was given."""
        if self.loss is None:
            return inputs
        self.loss.calls.notes = [self.alarm.watch(inputs)] if self.alarm is not None else []
        if self.preparation is None:
            return inputs
        if not self.expects_training:
            self.loss.base_objective = self.loss.objective = cross_entropy
            self.loss.calls.notes.append(refuse_unprepared)
            return inputs
        if self.own_text:
            self.loss.setting = Setting()  # weights of 1
        inputs, objective = self.preparation.prepare(self.engine, inputs, self.own_text)
        self.loss.base_objective = objective
        penalized = self.regularization is not None and not self.own_text
        self.loss.objective = self.regularization.around(objective) if penalized else objective
        return inputs

    def reduce(self) -> StepSums:
        """Pack this rank's sums, reduce them over all ranks where that is due, and start the accumulators anew."""
        tokens = torch.zeros(len(TOKEN_FIELDS) + 3 * NUM_BINS, dtype=torch.float64, device=self.device)
        if self.loss is not None:
            self.measured = self.loss.measure and self.loss.backwards > 0
            self.loss.require_used()
            if self.own_text:
                self.loss.train.reset()
            tokens = self.loss.close_step()
        count = len(TOKEN_FIELDS)
        vector = torch.cat([tokens[:count], self._step_fields(), tokens[count:]])
        return self.pace.reduce(vector, self.applied_steps, self.gradients.whole)

    def _step_fields(self) -> torch.Tensor:
        """This rank's STEP_FIELDS, fp64; no host synchronization. The update's norms wait for a step that measures."""
        values = torch.zeros(len(STEP_FIELDS), dtype=torch.float64, device=self.device)
        values[:3] = self.hooks.products(self.device)
        if self.noise is not None:
            self.noise.close()
            values[3:6] = self.noise.sums
            values[5] /= self.gradients.loss_scale
            self.noise.clear()
        if self.pace.measures(self.applied_steps):
            values[6:8] = self.meter.sums
        if self.pace.measures(self.applied_steps) or self.meter.active:
            self.meter.clear()  # of several updates the last one waits: a resumed run could not go on adding in the same order
        values[8], values[9] = float(self.stop_wish()), time.perf_counter() - self.started
        return values

    @contextmanager
    def in_force(self, sums: StepSums) -> Iterator[None]:
        """What DeepSpeed's own step must respect: this step's clip threshold, or a skip when a number is not finite."""
        if self.ema is not None:
            self.ema.begin(self.applied_steps)
        self.learning_rate = self.engine.get_lr()[0]
        self.loss_scale = self.gradients.loss_scale
        self.realized = realized_weight(sums, self.loss.setting.mean_weight) if self.loss is not None else None
        self.threshold, self.overweight = bounded_threshold(self.clipping and self.clipping.threshold, self.realized, sums)
        with ExitStack() as stack:
            stack.enter_context(self.gradients.clipped_at(self.threshold))
            stack.enter_context(self.gradients.norm_known(sums["grad_sq"]))
            if not sums.finite:
                stack.enter_context(self.gradients.skipped())
            yield

    def finish(self, sums: StepSums, applied: bool) -> None:
        """Close the step: metrics, then the state of an applied step, then what the next step uses.

        Raises:
            SkippedStepsError: on every rank, when `max_skipped_steps` steps in a row were skipped.
        """
        now = time.perf_counter()
        elapsed, self.started = now - self.started, now
        self.stop_requested = sums["stop_requests"] > 0
        metrics = self._step_metrics(sums, elapsed)
        step = self.applied_steps
        metrics |= self._applied(sums) if applied else self._skipped(sums)
        metrics |= self.measures.metrics() | {"stability/skipped_steps": self.skipped_steps}
        self.metrics = as_metrics(metrics)
        self.effect.observe(step, self.metrics)
        self._prepare()
        self._publish()
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            if self.recorder is not None:
                self.recorder.flush()  # nobody else will: the lines that say what happened
            raise SkippedStepsError(
                f"{self.skipped_in_a_row} optimizer steps in a row were skipped, the last for non-finite "
                f"{', '.join(non_finite_fields(sums)) or 'gradient norm'}; the weights are those of the last applied step"
            )

    def _applied(self, sums: StepSums) -> dict[str, float | None]:
        """Metrics of the parts that act, which then learn from the step."""
        metrics: dict[str, float | None] = {}
        for stabilizer in self.stabilizers.values():
            metrics.update(stabilizer.metrics())
            if not (self.own_text and stabilizer is self.governance):  # which has seen nothing, and does not act
                stabilizer.update(sums)
        if self.governance is not None and self.governance.warning and not self.own_text and dist.get_rank() == 0:
            logger.warning(self.governance.warning)
        if self.ema is not None:
            self.ema.update()
            metrics.update(self.ema.metrics())
        self.measures.update(sums)
        self.applied_steps += 1
        self.skipped_in_a_row = 0
        return metrics

    def _skipped(self, sums: StepSums) -> dict[str, bool]:
        """Count the step. A dynamic fp16 loss scale finds its range by overflowing: those steps are no sign of a broken run."""
        self.skipped_steps += 1
        finite_loss = bool(np.isfinite(sums.vector[: len(TOKEN_FIELDS)]).all())
        searching = finite_loss and self.gradients.scaling_down(self.loss_scale)
        self.skipped_in_a_row += 0 if searching else 1
        return {"skipped": True}

    def _step_metrics(self, sums: StepSums, elapsed: float) -> dict[str, float | None]:
        metrics = token_metrics(sums, self.loss is not None and self.loss.high_frequency_V is not None) | gradient_metrics(sums)
        if not self.measured:
            metrics["stability/tokens"] = None  # 0 would say that every label was masked
        metrics["stability/realized_weight"] = self.realized
        metrics["loss"] = metrics["loss"] and metrics["loss"] / self.overweight
        metrics |= clip_metrics(metrics["grad_norm"], self.engine.gradient_clipping(), self.threshold)
        metrics["stability/loss_scale"] = self.loss_scale
        metrics["learning_rate"] = float(self.learning_rate)
        metrics["step_seconds"] = elapsed
        metrics["tokens_per_second"] = sums["tokens"] / elapsed if sums["tokens"] > 0 else None
        return metrics

    def _publish(self) -> None:
        step = self.engine.global_steps
        for listener in self.listeners:
            listener(step, self.metrics)
        if self.engine.monitor.enabled and dist.get_rank() == 0:
            events = [(key, value, self.engine.global_samples) for key, value in self.metrics.items() if value is not None]
            self.engine.monitor.write_events(events)

    def summary(self) -> list[str]:
        """What the stabilizers have held, how often they acted, and what never did: one line each, for the end of a run."""
        return self.effect.lines()

    # ---- evaluation ---------------------------------------------------------------------------------------------

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Evaluate or export inside: the model's weights are their average (`stability.ema`), and the plain ones afterwards.

        They are the same to the bit as before. Without `ema`, or before it has begun, the weights stay as they are. A
        collective: enter and leave on every rank, between optimizer steps. A step or a checkpoint inside is refused.
        """
        if self.ema is None:
            yield
            return
        self.ema.mend(self.engine)
        with self.ema.in_place_of_weights(self.engine):
            yield
        self.restart_clock()

    def require_own_weights(self, what: str) -> None:
        """Raises RuntimeError inside `averaged_weights()`; sees to it that the parameters are those of the training."""
        if self.ema is not None:
            self.ema.require_plain(self.engine, what)

    def evaluation_metrics(self) -> dict[str, float | None]:
        """Token statistics of all evaluation passes since the last call, over all ranks; a collective of its own.

        Keys as in the tag table, under `eval/`. The stabilizers do not see these passes. Call it inside `averaged_weights()`
        if they were there.
        """
        if self.ema is not None:
            self.ema.mend(self.engine)  # or a rank where averaged_weights() failed would wait here, the others there
        sums = reduce_tokens(self.loss.evaluated(), self.group)
        metrics = token_metrics(sums, self.loss.high_frequency_V is not None)
        self.restart_clock()
        names = ("surprisal_variance", "entropy", "top1_mass", "log_partition", "high_frequency_mass", "tokens")
        result = {"eval/averaged": int(self.ema.swapped)} if self.ema is not None else {}
        return as_metrics({"eval/cross_entropy": metrics["cross_entropy"]} | result | {f"eval/{name}": metrics[f"stability/{name}"] for name in names})

    def restart_clock(self) -> None:
        """Leave what was done since the last step (evaluation, a probe, a checkpoint) out of the next step's time."""
        self.started = time.perf_counter()

    def release(self) -> None:
        """Take away all that hangs on the model, its parameters and the base optimizers."""
        self.hooks.remove()
        if self.loss is not None:
            self.loss.release()

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Replicated state, JSON-ready. Collective: the update meter's pending sums are made global."""
        return {
            "version": STATE_VERSION,
            "config": self.config.to_dict(),
            "applied_steps": self.applied_steps,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "stabilizers": {name: part.state_dict() for name, part in self.stabilizers.items()},
            "measures": self.measures.state_dict(),
            "update_meter": self.meter.pending(self.group),
            "alarm": self.alarm_state if self.alarm is None else self.alarm.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }

    def load_state_dict(self, state: dict, settle: Collection[str] = ()) -> None:
        """Continue from `state`.

        Args:
            settle: stabilizers whose setting of the coming step is still to be chosen (takeover.py).

        Raises:
            StabilityConfigError: the state was written under another block, or by another version of this format.
        """
        require_version(state)
        require_same_block(training_part(state["config"]), training_part(self.config.to_dict()))
        for name in ("applied_steps", "skipped_steps", "skipped_in_a_row"):
            setattr(self, name, state[name])
        for name, part in self.stabilizers.items():
            part.load_state_dict(state["stabilizers"][name])
            if name in settle:
                part.settle()
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.alarm_state = state["alarm"]
        if self.alarm is not None and self.alarm_state is not None:
            self.alarm.load_state_dict(self.alarm_state)
        self.measures = StabilityMeasures.from_state_dict(state["measures"])
        self.meter.restore(state["update_meter"], self.group)
        self._prepare()
