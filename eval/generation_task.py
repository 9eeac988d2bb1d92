"""The samples of a cell: every prompt continued under every decoding.

A unit is one batch of one decoding. Its rows, sorted by the length of the prompt, and with that its padding, follow from the
suite alone, so that any rank makes the same bytes of it, in any order, in one go or after a kill.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ds_stability.errors import UserError

from .decoding import Decoding, sample_key
from .generation import Generated
from .records import Measured, Prompt, Sample, ScoringContext
from .results import samples_measured


class TextSource(Protocol):
    """What makes texts: generation.Generator, or one of backends.py."""

    def generate_keyed(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, keys: Sequence[str], max_new_tokens: int
    ) -> list[Generated]: ...


class Row(NamedTuple):
    """A text to be made; `number` counts the samples of a prompt under this seed, `sample` over all seeds."""

    prompt: Prompt
    seed: int
    number: int
    sample: int


class GenerationTask:
    """See the module's docstring.

    Args:
        generator: generation.Generator, or another backend (backends.make_backend).
        tokenizer: decodes the texts.
        prompts: at least one token each, with room for `max_new_tokens` in the context (texts.check_context).
        decodings: sampled ones give `samples_per_prompt` texts per prompt and seed, the others one text per prompt, which
            has nothing to do with a seed and carries the first.
        seeds: sampling seeds. The texts of a seed do not depend on which other seeds stand beside it.
        max_new_tokens: the cap, end token included.
        batch_size: texts of a unit, the last unit of a decoding excepted.
        context: what the samples are scored against.
        metrics: names out of metrics.METRIC_NAMES; None means all.

    Raises:
        UserError: two decodings of one name, or prompts with one index twice.
    """

    name = "samples"

    def __init__(
        self,
        generator: TextSource,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        decodings: Sequence[Decoding],
        seeds: Sequence[int],
        samples_per_prompt: int,
        max_new_tokens: int,
        batch_size: int,
        context: ScoringContext,
        metrics: Sequence[str] | None = None,
    ):
        _check_unique("decodings", [decoding.name for decoding in decodings])
        _check_unique("prompts", [prompt.index for prompt in prompts])
        _check_unique("seeds", list(seeds))
        self.generator, self.tokenizer, self.context = generator, tokenizer, context
        self.prompts, self.seeds, self.samples_per_prompt = list(prompts), list(seeds), samples_per_prompt
        self.max_new_tokens, self.batch_size, self.metrics = max_new_tokens, batch_size, metrics
        self.decodings = {decoding.name: decoding for decoding in decodings}
        self._by_length = sorted(self.prompts, key=lambda prompt: (len(prompt.token_ids), prompt.index))

    def _texts_of_a_prompt(self, decoding: Decoding) -> int:
        return len(self.seeds) * self.samples_per_prompt if decoding.sampled else 1

    def units(self) -> list[str]:
        """"DECODING/BATCH", by decoding in the order of the suite, then by length of prompt."""
        return [f"{name}/{number:05d}" for name, decoding in self.decodings.items()
                for number in range(-(-len(self.prompts) * self._texts_of_a_prompt(decoding) // self.batch_size))]  # fmt: skip

    def rows(self, unit: str) -> list[Row]:
        """The texts of a batch; made anew each time, as a cell may have millions."""
        name, number = unit.rsplit("/", 1)
        each = self._texts_of_a_prompt(self.decodings[name])
        first = int(number) * self.batch_size
        last = min(first + self.batch_size, len(self.prompts) * each)
        return [self._row(*divmod(place, each)) for place in range(first, last)]

    def _row(self, prompt: int, sample: int) -> Row:
        seed, number = divmod(sample, self.samples_per_prompt)
        return Row(self._by_length[prompt], self.seeds[seed], number, sample)

    def run(self, unit: str, scratch: Path) -> list[dict[str, Any]]:
        """The Samples of one batch as JSON, in the order of its rows."""
        rows, decoding = self.rows(unit), self.decodings[unit.rsplit("/", 1)[0]]
        keys = [sample_key(row.seed, decoding.name, row.prompt.index, row.number) for row in rows]
        texts = self.generator.generate_keyed([row.prompt.token_ids for row in rows], decoding, keys, self.max_new_tokens)
        return [self._sample(row, decoding, text).to_dict() for row, text in zip(rows, texts, strict=True)]

    def _sample(self, row: Row, decoding: Decoding, text: Generated) -> Sample:
        return Sample(
            prompt=row.prompt.index,
            decoding=decoding.name,
            sample=row.sample,
            seed=row.seed,
            token_ids=text.token_ids,
            text=self.tokenizer.decode(text.token_ids, skip_special_tokens=True),
            finish=text.finish,
            entropy_sum=text.entropy_sum,
            logprob_sum=text.logprob_sum,
            scored_tokens=text.scored_tokens,
        )

    def measure(self, records: Iterable[dict[str, Any]], scratch: Path) -> list[Measured]:
        """The metrics of every decoding, in the order of the suite; the texts of one prompt are one unit."""
        return samples_measured(map(Sample.from_dict, records), self.context, self.metrics, scratch)


def _check_unique(what: str, values: list[Any]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise UserError(f"{what}: {value!r} is given twice; remove one")
