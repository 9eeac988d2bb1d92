"""Which blocks an optimizer step trains on: the same at every number of processes, and after a resume.

An epoch is a permutation of all blocks, drawn from (seed, epoch) as Accelerate draws it, then as many blocks without a
supervised token as fill the last optimizer step. Step t of an epoch takes the blocks [t B, (t + 1) B) of it, B being the
global batch, however many processes share them: Accelerate deals batch k of an epoch to process k mod world.

Without the filling, Accelerate (1.15) repeats the epoch's first blocks at its end, as many as the number of processes asks
for: tokens seen twice, and another last step at every number of processes.
"""

from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset, IterableDataset, RandomSampler, Sampler
from transformers import Trainer, TrainerCallback

from ds_stability.data.packing import PaddedBlocks, pad_to_multiple


class EpochOrder(Sampler[int]):
    """Indices of an epoch: a permutation of the `blocks` blocks, then `blocks`, `blocks` + 1, ... `length` - 1."""

    def __init__(self, blocks: int, length: int, seed: int):
        self.blocks, self.length = blocks, length
        self.shuffled = SeedableRandomSampler(range(blocks), data_seed=seed)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        yield from self.shuffled
        yield from range(self.blocks, self.length)

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Accelerate calls it too, but only finds it where no batches are to be skipped."""
        self.shuffled.set_epoch(epoch)


class DataPosition(TrainerCallback):
    """Tells the sampler at which epoch a resumed run is."""

    def __init__(self, order: EpochOrder):
        self.order = order

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.order.set_epoch(int(state.epoch or 0))  # a resumed run begins in the middle: 1.5


class OrderedTrainer(Trainer):
    """A Trainer that takes its blocks in `EpochOrder`, if it is to shuffle them; `fill_last_step` prepared them."""

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is not RandomSampler:
            return sampler
        blocks = sampler.data_source.blocks if isinstance(sampler.data_source, PaddedBlocks) else sampler.data_source
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        order = EpochOrder(len(blocks), len(sampler.data_source), seed)
        self.add_callback(DataPosition(order))
        return order


def fill_last_step(blocks: Dataset, global_batch: int) -> Dataset:
    """`blocks`, and masked ones up to a multiple of the global batch; a stream, whose length is unknown, as it is."""
    return blocks if isinstance(blocks, IterableDataset) else pad_to_multiple(blocks, global_batch)
