"""Data position: with Trainer's own data loader, an optimizer step takes the same blocks at 1, 2 and 4 processes."""

from itertools import chain

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import Dataset
from transformers import TrainerState, TrainingArguments, default_data_collator

from ds_stability.launchers.data_order import OrderedTrainer, fill_last_step

GLOBAL, MASKED = 8, -1
LAYOUTS = [(1, 2, 4), (2, 2, 2), (4, 2, 1), (4, 1, 2), (1, 8, 1)]  # processes, batch size of one, accumulation: 8 blocks a step


class Numbered(Dataset):
    def __init__(self, blocks):
        self.blocks = blocks

    def __len__(self):
        return self.blocks

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([index, 0]), "labels": torch.tensor([-100, index])}


def steps_of(monkeypatch, tmp_path, blocks, layout, epoch, done=0, resumed=None):
    """[sorted numbers of the blocks of each step] of the rest of `epoch`, `done` steps of which lie behind.

    As Trainer goes about it: the loader, then the callbacks, `skip_first_batches`, `set_epoch`.
    """
    world, size, accumulation = layout
    per_rank = []
    for rank in range(world):
        args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=size, seed=3,
                                 gradient_accumulation_steps=accumulation, report_to="none", remove_unused_columns=False)  # fmt: skip
        trainer = OrderedTrainer(model=torch.nn.Linear(2, 2), args=args, data_collator=default_data_collator,
                                 train_dataset=fill_last_step(Numbered(blocks), GLOBAL))  # fmt: skip
        for shared in (PartialState._shared_state, AcceleratorState._shared_state):
            monkeypatch.setitem(shared, "num_processes", world)
            monkeypatch.setitem(shared, "process_index", rank)
        loader = trainer.get_train_dataloader()
        length = len(loader)
        state = TrainerState(epoch=None if epoch + done == 0 else epoch + done * accumulation / length)
        trainer.callback_handler.on_epoch_begin(args, state, trainer.control)
        skipped = skip_first_batches(loader, done * accumulation) if done else loader
        skipped.set_epoch(epoch)
        numbers = [[int(b) if b > MASKED else MASKED for b in batch["labels"][:, 1]] for batch in skipped]
        assert len(numbers) == length - done * accumulation
        per_rank.append(numbers)
        monkeypatch.undo()
    rounds = [list(chain(*together)) for together in zip(*per_rank, strict=True)]
    return [sorted(chain(*rounds[at : at + accumulation])) for at in range(0, len(rounds), accumulation)]


@pytest.mark.parametrize("blocks", [16, 29, 5])
def test_a_step_takes_the_same_blocks_at_every_number_of_processes(monkeypatch, tmp_path, blocks):
    for epoch in (0, 1):
        steps = [steps_of(monkeypatch, tmp_path, blocks, layout, epoch) for layout in LAYOUTS]
        assert all(other == steps[0] for other in steps)
        assert sorted(number for step in steps[0] for number in step if number >= 0) == list(range(blocks))
        assert all(len(step) == GLOBAL for step in steps[0])
    assert blocks < GLOBAL or steps[0] != steps_of(monkeypatch, tmp_path, blocks, LAYOUTS[0], 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("epoch", "done"), [(0, 2), (1, 0), (1, 1), (1, 3), (4, 2)])
def test_a_resumed_run_goes_on_where_it_was(monkeypatch, tmp_path, layout, epoch, done):
    whole = steps_of(monkeypatch, tmp_path, 29, LAYOUTS[1], epoch)
    assert steps_of(monkeypatch, tmp_path, 29, layout, epoch, done) == whole[done:]


def test_the_order_is_accelerates_own(tmp_path):
    """Runs that were recorded with Trainer's own sampler keep their order."""
    from transformers import Trainer, set_seed

    orders = []
    for kind in (Trainer, OrderedTrainer):
        args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=2, seed=3, report_to="none",
                                 remove_unused_columns=False)  # fmt: skip
        set_seed(3)
        trainer = kind(model=torch.nn.Linear(2, 2), args=args, train_dataset=Numbered(16), data_collator=default_data_collator)
        orders.append([batch["input_ids"][:, 0].tolist() for batch in trainer.get_train_dataloader()])
    assert orders[0] == orders[1]


def test_what_fills_the_last_step_trains_nothing():
    filled = fill_last_step(Numbered(5), GLOBAL)
    assert len(filled) == GLOBAL and all((filled[index]["labels"] == -100).all() for index in (5, 6, 7))
    assert fill_last_step(Numbered(16), GLOBAL)[15]["labels"][1] == 15
