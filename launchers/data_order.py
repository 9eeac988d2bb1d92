"""Which blocks an optimizer step trains on: the same at every number of processes, and after a resume.

A pass goes over all blocks once, then over as many blocks without a supervised token as fill the last optimizer step.
Map-style blocks are permuted, drawn from (seed, pass) as Accelerate draws it; a stream has its own order. Step t of a pass
takes the blocks [t B, (t + 1) B) of it, B being the global batch, however many processes and loader workers share them:
Accelerate deals batch k to process k mod world.

Without the filling, Accelerate (1.15) repeats the first blocks at the end of a pass, as many as the number of processes asks
for: tokens seen twice, and another last step at every number of processes. Of a stream, whose length it does not know, Trainer
(5.23) counts no passes, and a resumed run would begin the one that it was in again. Trainer therefore gets all passes over a
stream as one, without an end.

A branch may go on with another global batch, in the middle of a pass. Where a step begins then follows from the batches so far:

    [(0, 16), (200, 32)]    16 blocks a step, from step 200 on 32
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice, repeat

import torch
from accelerate.data_loader import DataLoaderDispatcher, SeedableRandomSampler
from torch.utils.data import Dataset, IterableDataset, RandomSampler, Sampler, get_worker_info
from transformers import Trainer, TrainerCallback, TrainingArguments

from ds_stability.data.packing import IGNORE, PaddedBlocks, StreamingBlocks, pad_to_multiple
from ds_stability.errors import UserError

Batches = Sequence[tuple[int, int]]  # (first step, blocks a step) of each global batch that a run has had, by step


def position(batches: Batches, step: int, blocks: float) -> tuple[int, int]:
    """(pass, how many of its blocks lie behind) where optimizer step `step` begins, `blocks` being the length of a pass."""
    number = offset = 0
    for (first, batch), (following, _) in zip(batches, [*batches[1:], (step, 0)], strict=True):
        steps = min(following, step) - first
        if offset + steps * batch < blocks:
            offset += max(steps, 0) * batch
            continue
        steps -= -(-(blocks - offset) // batch)  # to the end of the pass, whose last step is filled up
        passes, steps = divmod(steps, -(-blocks // batch))
        number, offset = number + 1 + passes, steps * batch
    return number, offset


class EpochOrder(Sampler[int]):
    """Indices of what Trainer takes for an epoch: as many steps as a pass has; `blocks` stands for a block that fills up.

    Args:
        blocks: length of a pass. batches: see above.
    """

    def __init__(self, blocks: int, batches: Batches, seed: int):
        self.blocks, self.batches, self.epoch = blocks, batches, 0
        self.steps = -(-blocks // batches[-1][1])
        self.shuffled = SeedableRandomSampler(range(blocks), data_seed=seed)

    def __len__(self) -> int:
        return self.steps * self.batches[-1][1]

    def __iter__(self) -> Iterator[int]:
        first, batch = self.batches[-1]
        begin = self.epoch * self.steps
        behind = min(max(first - begin, 0), self.steps) * batch  # trained with another batch; nobody looks at these
        return chain(repeat(self.blocks, behind), islice(self._from(max(first, begin)), len(self) - behind))

    def _from(self, step: int) -> Iterator[int]:
        number, offset = position(self.batches, step, self.blocks)
        for number in count(number):  # noqa: B020
            self.shuffled.set_epoch(number)
            yield from islice(list(self.shuffled), offset, None)
            yield from repeat(self.blocks, (offset - self.blocks) % self.batches[-1][1])
            offset = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the steps; Accelerate calls it too, but only finds it where no batches are to be skipped."""
        self.epoch = epoch

    def begin(self, step: int) -> None:
        """The run goes on before optimizer step `step`."""
        self.set_epoch(step // self.steps)


class EndlessStream(IterableDataset):
    """All passes over a stream as one, each filled up to whole optimizer steps.

    Attributes:
        unit: blocks that the loader fetches together: loader worker w of n gets the units w, w + n, ...
        done: optimizer steps that lie behind. Nobody looks at their blocks, which are not made.
    """

    def __init__(self, stream: StreamingBlocks, batches: Batches):
        self.stream, self.batches, self.unit, self.done = stream, batches, 1, 0

    def begin(self, step: int) -> None:
        self.done = step

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for place, (parts, trains) in enumerate(self._places()):
            if place // self.unit % workers == number:
                block = self.stream.block(parts)
                yield block if trains else {**block, "labels": torch.full_like(block["labels"], IGNORE)}

    def _places(self) -> Iterator[tuple[tuple, bool]]:
        """(what the block is made of, whether it trains)."""
        first, batch = self.batches[-1]
        step = max(first, self.done)
        number, parts = self._from(step)
        last = next(parts)
        yield from repeat((last, False), step * batch)
        parts = chain([last], parts)
        for number in count(number + 1):  # noqa: B020
            trained = 0
            for last in parts:
                trained += 1
                yield last, True
            yield from repeat((last, False), -trained % batch)
            parts = self.stream.parts(number)

    def _from(self, step: int) -> tuple[int, Iterator[tuple]]:
        """(pass, its parts from where step `step` begins). A pass has to be gone through once to know its length."""
        parts = self.stream.parts(0)
        _, offset = position(self.batches, step, float("inf"))
        passed = sum(1 for _ in islice(parts, offset))
        following = next(parts, None)
        if following is not None:
            return 0, chain([following], parts)
        number, offset = position(self.batches, step, passed)
        parts = self.stream.parts(number)
        deque(islice(parts, offset), maxlen=0)
        return number, parts


class DataPosition(TrainerCallback):
    """Tells the data at which step a resumed run is."""

    def __init__(self, order: EpochOrder | EndlessStream):
        self.order = order

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.order.begin(state.global_step)


class OrderedTrainer(Trainer):
    """A Trainer that takes its blocks in the order above; `in_order` prepared them.

    Args:
        batches: the global batches of the run; None is this one's from the start.
    """

    def __init__(self, *args, batches: Batches | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        a = self.args
        self.batches = batches or [(0, a.per_device_train_batch_size * a.gradient_accumulation_steps * a.world_size)]

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if isinstance(self.train_dataset, EndlessStream):
            dealt = isinstance(loader, DataLoaderDispatcher)  # rank 0 fetches every rank's batch, one by one
            self.train_dataset.unit = self.args.train_batch_size * (1 if dealt else self.args.world_size)
            self.add_callback(DataPosition(self.train_dataset))
        return loader

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is not RandomSampler:
            if len(self.batches) > 1:
                raise UserError("another global batch than the trunk's needs the order that is drawn at random; leave out "
                                "--train_sampling_strategy, or give the trunk's batch")  # fmt: skip
            return sampler
        blocks = sampler.data_source.blocks if isinstance(sampler.data_source, PaddedBlocks) else sampler.data_source
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        order = EpochOrder(len(blocks), self.batches, seed)
        self.add_callback(DataPosition(order))
        return order

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        epochs, batches = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        if self.state.global_step >= max_steps:  # Trainer would train one step more, but at the end of an epoch
            return num_train_epochs, 0
        return epochs, batches


def in_order(blocks: Dataset, batches: Batches) -> Dataset:
    """`blocks` as `OrderedTrainer` takes them: with what fills up the last step of a pass."""
    if isinstance(blocks, IterableDataset):
        return EndlessStream(blocks, batches)
    if len(batches) > 1:  # the rest of the pass in which the batch changed
        return PaddedBlocks(blocks, len(blocks) + 1)
    return pad_to_multiple(blocks, batches[-1][1])


def check_order(args: TrainingArguments, streaming: bool) -> None:
    """Raise UserError for flags under which blocks would not come in the order above."""
    if args.accelerator_config.split_batches:
        raise UserError("--accelerator_config split_batches true: is not supported, as --per_device_train_batch_size would mean all "
                        "processes together; leave it out")  # fmt: skip
    if args.accelerator_config.dispatch_batches and not streaming:  # Accelerate (1.15) skips too few batches in a resumed run
        raise UserError("--accelerator_config dispatch_batches true: works with --streaming alone; leave it out")
    for flag in ("save_strategy", "eval_strategy", "logging_strategy"):
        if streaming and getattr(args, flag) == "epoch":
            raise UserError(f"--{flag} epoch: a stream has no epochs, as its length is not known; give steps")
