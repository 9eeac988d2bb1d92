"""Data position: with Trainer's own data loader, an optimizer step takes the same blocks at 1, 2 and 4 processes."""

from itertools import chain

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import Dataset
from transformers import TrainerState, TrainingArguments, default_data_collator

from ds_stability.data.packing import StreamingBlocks
from ds_stability.errors import UserError
from ds_stability.launchers.data_order import OrderedTrainer, check_order, in_order, position

GLOBAL, MASKED = 8, -1
LAYOUTS = [(1, 2, 4), (2, 2, 2), (4, 2, 1), (4, 1, 2), (1, 8, 1)]  # processes, batch size of one, accumulation: 8 blocks a step


class Numbered(Dataset):
    def __init__(self, blocks):
        self.blocks = blocks

    def __len__(self):
        return self.blocks

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([index, 0]), "labels": torch.tensor([-100, index])}


def arguments(folder, size, accumulation, **more):
    return TrainingArguments(str(folder), use_cpu=True, per_device_train_batch_size=size, seed=3, gradient_accumulation_steps=accumulation,
                             report_to="none", remove_unused_columns=False, disable_tqdm=True, **more)  # fmt: skip


def steps_of(monkeypatch, tmp_path, blocks, layout, epoch, done=0, resumed=None):
    """[sorted numbers of the blocks of each step] of the rest of `epoch`, `done` steps of which lie behind.

    As Trainer goes about it: the loader, then the callbacks, `skip_first_batches`, `set_epoch`.
    """
    world, size, accumulation = layout
    per_rank = []
    for rank in range(world):
        batches = [(0, GLOBAL)]
        args = arguments(tmp_path, size, accumulation)
        trainer = OrderedTrainer(model=torch.nn.Linear(2, 2), args=args, data_collator=default_data_collator, batches=batches,
                                 train_dataset=in_order(Numbered(blocks), batches))  # fmt: skip
        for shared in (PartialState._shared_state, AcceleratorState._shared_state):
            monkeypatch.setitem(shared, "num_processes", world)
            monkeypatch.setitem(shared, "process_index", rank)
        loader = trainer.get_train_dataloader()
        length = len(loader)
        state = TrainerState(global_step=epoch * length // accumulation + done)
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
    filled = in_order(Numbered(5), [(0, GLOBAL)])
    assert len(filled) == GLOBAL and all((filled[index]["labels"] == -100).all() for index in (5, 6, 7))
    assert in_order(Numbered(16), [(0, GLOBAL)])[15]["labels"][1] == 15


# ---- whole runs, by the blocks that each micro-batch trains ------------------------------------------------------------


class Stream(StreamingBlocks):
    """Block i holds the number i."""

    def __init__(self, blocks, **options):
        super().__init__(list, None, 2, 0, **options)
        self.blocks, self.passes = blocks, []

    def _parts(self):
        self.passes.append(0)
        for number in range(self.blocks):
            self.passes[-1] += 1
            yield np.array([0, number]), np.array([0]), np.array([False, True])


class Recording(torch.nn.Module):
    """Remembers the blocks of each micro-batch."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, input_ids, labels, position_ids=None):
        self.seen.append([int(number) if number > MASKED else MASKED for number in labels[:, 1]])
        return {"loss": self.weight.sum() * 0.0}


def run(folder, data, batches, layout, steps, resume=None, **more):
    """[blocks of each step] that a Trainer on one process takes, from the checkpoint of step `resume` on."""
    size, accumulation = layout
    args = arguments(folder, size, accumulation, max_steps=steps, save_steps=1, **more)
    trainer = OrderedTrainer(model=Recording(), args=args, data_collator=default_data_collator, batches=batches,
                             train_dataset=in_order(data, batches))  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    seen = trainer.model.seen
    return [sorted(chain(*seen[at : at + accumulation])) for at in range(0, len(seen), accumulation)]


def kinds(blocks):
    return {"map": lambda: Numbered(blocks), "stream": lambda: Stream(blocks), "shuffled": lambda: Stream(blocks, shuffle_buffer=5, seed=3)}


@pytest.mark.parametrize(("kind", "workers"), [("map", 0), ("stream", 0), ("shuffled", 0), ("shuffled", 2)])
def test_every_pass_trains_each_block_once_and_a_resumed_run_goes_on(tmp_path, kind, workers):
    """23 blocks, 4 a step: 6 steps a pass, the last one filled up with a masked block; the third pass ends with the run."""
    data, batches = kinds(23)[kind], [(0, 4)]
    more = {"dataloader_num_workers": workers}
    whole = run(tmp_path, data(), batches, (2, 2), 14, **more)
    assert len(whole) == 14
    for begin in (0, 6):
        assert sorted(chain(*whole[begin : begin + 6])) == [MASKED, *range(23)]
    assert (whole[:6] == whole[6:12]) == (kind == "stream")
    for step, layout in ((6, (1, 4)), (9, (2, 2)), (13, (4, 1)), (14, (2, 2))):
        assert run(tmp_path, data(), batches, layout, 14, resume=step, **more) == whole[step:], step


def test_whole_passes_that_lie_behind_are_not_read_again(tmp_path):
    stream, batches = Stream(23), [(0, 4)]
    run(tmp_path, stream, batches, (2, 2), 26)
    assert len(stream.passes) == 5
    resumed = Stream(23)
    run(tmp_path, resumed, batches, (2, 2), 26, resume=25)
    assert resumed.passes[0] == 23 and len(resumed.passes) == 2  # the first one, for its length, and the one that goes on


def stream_steps(monkeypatch, tmp_path, layout, steps, done=0, workers=0):
    """[blocks of each step] of a shuffled stream that every process reads by itself."""
    world, size, accumulation = layout
    per_rank = []
    for rank in range(world):
        args = arguments(tmp_path, size, accumulation, max_steps=steps, dataloader_num_workers=workers,
                         accelerator_config={"dispatch_batches": False})  # fmt: skip
        data = in_order(Stream(29, shuffle_buffer=5), [(0, GLOBAL)])
        trainer = OrderedTrainer(model=torch.nn.Linear(2, 2), args=args, data_collator=default_data_collator, train_dataset=data)
        for shared in (PartialState._shared_state, AcceleratorState._shared_state):
            monkeypatch.setitem(shared, "num_processes", world)
            monkeypatch.setitem(shared, "process_index", rank)
        loader = trainer.get_train_dataloader()
        assert data.unit == size * world
        trainer.callback_handler.on_epoch_begin(args, TrainerState(global_step=done), trainer.control)
        rest = iter(skip_first_batches(loader, done * accumulation) if done else loader)
        per_rank.append([[max(int(b), MASKED) for b in next(rest)["labels"][:, 1]] for _ in range((steps - done) * accumulation)])
        monkeypatch.undo()
    rounds = [list(chain(*together)) for together in zip(*per_rank, strict=True)]
    return [sorted(chain(*rounds[at : at + accumulation])) for at in range(0, len(rounds), accumulation)]


@pytest.mark.parametrize("layout", [*LAYOUTS[1:], (2, 2, 2, 2)])
def test_a_stream_is_dealt_alike_to_any_number_of_processes_and_workers(monkeypatch, tmp_path, layout):
    whole = run(tmp_path, Stream(29, shuffle_buffer=5), [(0, GLOBAL)], (2, 4), 9)
    layout, workers = layout[:3], sum(layout[3:])
    assert stream_steps(monkeypatch, tmp_path, layout, 9, workers=workers) == whole
    assert stream_steps(monkeypatch, tmp_path, layout, 9, 6, workers) == whole[6:]


@pytest.mark.parametrize("kind", ["map", "shuffled"])
def test_a_branch_with_another_batch_goes_on_where_the_trunk_was(tmp_path, kind):
    """8 steps of 4 blocks: the second pass of 23 blocks has 15 left, three steps of 6 blocks."""
    data, batches = kinds(23)[kind], [(0, 4), (8, 6)]
    trunk = run(tmp_path, data(), batches[:1], (2, 2), 18)
    branch = run(tmp_path, data(), batches, (3, 2), 16, resume=8)
    assert sorted(chain(*branch[:3])) == sorted([*[MASKED] * 2, *chain(*trunk[8:12])])
    assert sorted(chain(*branch[3:7])) == sorted(chain(*trunk[12:18])) == [MASKED, *range(23)]
    assert len(branch) == 8
    for step in (9, 11, 13, 16):
        assert run(tmp_path, data(), batches, (6, 1), 16, resume=step) == branch[step - 8 :]


def test_position_is_what_stepping_gives():
    batches, blocks = [(0, 4), (8, 6), (9, 23), (11, 50), (14, 1)], 23
    number = offset = 0
    for step in range(60):
        assert position(batches, step, blocks) == (number, offset), step
        offset += next(batch for first, batch in reversed(batches) if step >= first)
        if offset >= blocks:
            number, offset = number + 1, 0


@pytest.mark.parametrize(("flags", "streaming", "words"), [
    ({"accelerator_config": {"split_batches": True}}, True, "split_batches true"),
    ({"accelerator_config": {"dispatch_batches": True}}, False, "dispatch_batches true"),
    ({"save_strategy": "epoch"}, True, "--save_strategy epoch: a stream has no epochs"),
    ({"eval_strategy": "epoch"}, True, "--eval_strategy epoch"),
])  # fmt: skip
def test_what_would_change_the_order_is_refused(tmp_path, flags, streaming, words):
    with pytest.raises(UserError, match=words):
        check_order(arguments(tmp_path, 2, 2, **flags), streaming)
    check_order(arguments(tmp_path, 2, 2, save_strategy="epoch"), streaming=False)
    check_order(arguments(tmp_path, 2, 2, accelerator_config={"dispatch_batches": True}), streaming=True)
