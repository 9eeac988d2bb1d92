"""The end of a run: what it needs is looked for before step 1; the export, and what stays if it fails."""

import os
import shutil

import torch
import torch.distributed as dist

from ds_stability import engine_of
from ds_stability.data.frequency import FILE_NAME, HighFrequencySet
from ds_stability.errors import ExportError, UserError
from ds_stability.export import DESCRIPTION, export_model, write_description
from ds_stability.failures import storage_reason
from ds_stability.gathered import base_model
from ds_stability.model_card import card_of
from ds_stability.run_dir import RunDir


def prepare_final(run: RunDir, model: torch.nn.Module, tokenizer, frequent: HighFrequencySet, keeps_cache: bool) -> None:
    """Rank 0, before step 1: write all of the export but its weights, and see that these will fit on the disk.

    A resumed run gets back what was deleted meanwhile.

    Raises:
        UserError: there is too little room.
        OSError: the files cannot be written.
    """
    if dist.get_rank() != 0:
        return
    # ZeRO-3 keeps a partitioned parameter's size there.
    needed = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise UserError(f"--output_dir {run.path}: has {free / 2**30:.1f} GiB free, and the exported model alone takes {needed / 2**30:.1f} "
                        "GiB; make room, or give another --output_dir")  # fmt: skip
    write_description(model, tokenizer, run.path / DESCRIPTION, keeps_cache)
    keep_frequent(run, frequent)


def keep_frequent(run: RunDir, frequent: HighFrequencySet) -> None:
    """Write the set again if its file is gone: rank 0 holds what it needs at the end in memory."""
    if dist.get_rank() == 0 and not (run.path / FILE_NAME).is_file():
        frequent.save(os.fspath(run.path / FILE_NAME))


def export_final(trainer, run: RunDir, tokenizer, frequent: HighFrequencySet, keeps_cache: bool) -> None:
    """Write final/; a collective.

    Raises:
        ExportError: on every rank; a checkpoint of the last step is there then.
    """
    engine = engine_of(trainer.model)
    base_model(engine.module).config.get_text_config().use_cache = keeps_cache  # off while documents were packed
    ema = engine.stability.ema
    card = card_of(engine.stability.config.to_dict(), exported_step(trainer), trainer.state.global_step, None if ema is None else ema.updates)
    keep_frequent(run, frequent)
    try:
        with engine.stability.averaged_weights():
            export_model(engine, tokenizer, run.final, card, run.path / FILE_NAME)
    except ExportError as error:
        if storage_reason(error) is None:
            raise _kept(error, trainer, run) from error
        raise


def exported_step(trainer) -> int:
    """The step of the weights in the engine: Trainer loads those of the best evaluation, if it is told to."""
    state = trainer.state
    chosen = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if chosen else state.global_step


def _kept(error: ExportError, trainer, run: RunDir) -> ExportError:
    """Save what a failed export would lose; the error that says where it is."""
    step = trainer.state.global_step
    whole = [run.checkpoint(step) in dict(run.complete_checkpoints()).values()]
    dist.broadcast_object_list(whole, src=0)
    if not whole[0]:
        trainer._save_checkpoint(trainer.model, trial=None)
    adapter = f", the adapter in {run.path / 'adapter'}" if (run.path / "adapter").is_dir() else ""
    return ExportError(f"{error}; the training is complete and kept in {run.checkpoint(step)}{adapter}; repeat the export with: ds-stability "
                       f"export {run.path}")  # fmt: skip
