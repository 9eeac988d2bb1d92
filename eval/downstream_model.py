"""lm-evaluation-harness' `LM` over a model and tokenizer that are already loaded. Imports lm_eval: an optional extra.

lm-eval's own HFLM takes the index within the node for the rank, so that its figures across nodes are wrong; here it is the
global one. Encoding, truncation and windows are HFLM's. Batches are formed over the requests of all ranks, see
`downstream_batches`.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ds_stability.data.tokenizer import without_end

from .downstream_batches import Answer, BatchRunner, Request, digest
from .downstream_generation import GenerationSettings, generate

# Without one in the model's config, as in lm-eval.
DEFAULT_CONTEXT_LENGTH = 2048
DEFAULT_NEW_TOKENS = 256


def context_length_of(config: Any) -> int:
    """Positions of a model, by the names that transformers' configs give them."""
    values = config.to_dict()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        if isinstance(values.get(name), int):
            return values[name]
    return DEFAULT_CONTEXT_LENGTH


class HarnessModel(TemplateLM):
    """A causal LM for lm-eval. Its request methods are collective: every rank calls each of them equally often.

    Ranks may hand in shares of the requests (what `lm_eval.evaluate` does) or all the same: the answers are the same, to
    the bit on one kind of device. A request without a finite answer, or longer than the model, gets NaN or "" and is noted
    in `unanswered`, so that no score is made from it.

    Args:
        model, tokenizer: as loaded; the model in eval mode, on any device or spread over several, or None on a rank that
            the runner knows as one that does not work.
        runner: batch size, journal, and the ranks.
        context_length: positions of the model (default: from its config).
        seed: of sampled generations; they depend on it and on (task, document, repetition) only.
    """

    def __init__(self, model: Any, tokenizer: Any, runner: BatchRunner, context_length: int | None = None, seed: int = 0):
        super().__init__()
        self.model, self.tokenizer, self.runner, self.seed = model, tokenizer, runner, seed
        self._rank, self._world_size = runner.rank, runner.world_size
        self._device = torch.device("cpu") if model is None or model.device.type == "meta" else model.device
        own_length = context_length or (None if model is None else context_length_of(model.config))
        self.max_length = next(length for length in runner.gather(own_length) if length)
        self.unanswered: set[tuple[str, int]] = set()

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What conditions a text without context: begin-of-text, else end-of-text (None: there is neither)."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        prefix = "" if self.prefix_token_id is None else self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and prefix and string.startswith(prefix):
            add_special_tokens = False  # it has its begin-of-text already
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return without_end(self.tokenizer.encode(string, verbose=False, **options), string, self.tokenizer)

    # Collectives of `lm_eval.evaluate`.

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([value.reshape(-1) for value in self.runner.gather(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        values = self.runner.gather(obj)
        return values if self.rank == dst else None

    def barrier(self) -> None:
        self.runner.gather(None)

    # Log-likelihoods.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        asked = []
        for request in requests:
            context, continuation = request.args[:2]
            if context:
                context_ids, ids = self._encode_pair(context, continuation)
            else:
                ids = self.tok_encode(continuation, add_special_tokens=False)
                context_ids = [] if self.prefix_token_id is None else [self.prefix_token_id]
                if ids[:1] == context_ids:
                    context_ids, ids = ids[:1], ids[1:]
            asked.append(self._score_request(request.task_name, context_ids, ids))
        answers = self._score(asked)
        found = [answers[one.key] if one else None for one in asked]
        self._note(requests, found)
        return [(math.nan, False) if answer is None else (answer[0], answer[1]) for answer in found]

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        asked = [self._score_request(None, context_ids, ids) for _, context_ids, ids in requests]
        answers = self._score(asked)
        found = [answers[one.key] if one else None for one in asked]
        return [(math.nan, False) if answer is None else (answer[0], answer[1]) for answer in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts in windows of the model's length, each token predicted once; nats."""
        asked: list[list[Request | None]] = []
        for request in requests:
            ids, prefix = self.tok_encode(request.args[0]), self.prefix_token_id
            windows = get_rolling_token_windows(ids, prefix, max_seq_len=self.max_length, context_len=1)
            # An empty text has no window: nothing to predict, probability 1.
            pairs = [([], []) if prefix is None else make_disjoint_window(window) for window in windows]
            asked.append([self._score_request(request.task_name, *pair) for pair in pairs])
        answers = self._score([one for parts in asked for one in parts])
        found = []
        for parts in asked:
            values = [answers[one.key] if one else None for one in parts]
            found.append(None if any(value is None for value in values) else math.fsum(value[0] for value in values))
        self._note(requests, found)
        return [math.nan if answer is None else answer for answer in found]

    def _score_request(self, task: str | None, context_ids: list[int], ids: list[int]) -> Request | None:
        """None for what cannot be scored: no context, nothing to predict, or more to predict than the model holds."""
        if not context_ids or not ids or len(ids) > self.max_length:
            return None
        tokens = (context_ids + ids)[-(self.max_length + 1) :]  # the context loses its beginning, as in HFLM
        key = digest("score", task, tokens, len(ids))
        return Request(key, f"score {task}", len(tokens), (tokens, len(ids)))

    def _score(self, asked: Sequence[Request | None]) -> dict[str, Answer]:
        return self.runner.run([one for one in asked if one is not None], self._score_batch)

    @torch.inference_mode()
    def _score_batch(self, batch: list[Request]) -> list[Answer]:
        """[log-likelihood in nats, whether greedy decoding would say the same] of each; None if not finite."""
        width = max(len(one.payload[0]) for one in batch) - 1
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, one in enumerate(batch):  # padded on the right, where a causal model does not look
            tokens = one.payload[0][:-1]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        logits = self.model(input_ids=ids.to(self._device), use_cache=False).logits
        answers: list[Answer] = []
        for row, one in enumerate(batch):
            tokens, count = one.payload
            chosen = logits[row, len(tokens) - 1 - count : len(tokens) - 1].float()
            targets = torch.tensor(tokens[-count:], device=chosen.device)
            log_probs = torch.log_softmax(chosen, dim=-1).gather(1, targets[:, None])
            value = float(log_probs.double().sum())
            greedy = bool((chosen.argmax(dim=-1) == targets).all())
            answers.append([value, greedy] if math.isfinite(value) else None)
        return answers

    # Generation.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        asked, seen = [], Counter()
        for request in requests:
            context, options = request.args[:2]
            settings = GenerationSettings.parse(options, DEFAULT_NEW_TOKENS)
            draw = None
            if settings.sample is not None:
                place = (request.task_name, request.doc_id, request.idx)
                # lm-eval repeats a rank's last request to even out the ranks: what exceeds `repeats` is no new sample.
                draw = [*place, seen[place] if seen[place] < (request.repeats or 1) else 0]
                seen[place] += 1
            asked.append(self._generation_request(request.task_name, context, settings, draw))
        answers = self.runner.run([one for one in asked if one is not None], self._generate_batch)
        found = [answers[one.key] if one else None for one in asked]
        self._note(requests, found)
        return ["" if answer is None else answer for answer in found]

    def _generation_request(
        self, task: str | None, context: str, settings: GenerationSettings, draw: list | None
    ) -> Request | None:
        """`draw` names the sample, so that a sampled text is never taken for another repetition; None if it has no room."""
        ids, room = self.tok_encode(context), self.max_length - settings.max_new_tokens
        if not ids and self.prefix_token_id is not None:
            ids = [self.prefix_token_id]
        if room <= 0 or not ids:
            return None
        ids = ids[-room:]
        uniforms = None if draw is None else json.dumps([self.seed, "lm-eval", *draw])
        key = digest("generate", task, ids, settings.to_dict(), uniforms)
        group = f"generate {task} {json.dumps(settings.to_dict(), sort_keys=True)}"
        return Request(key, group, len(ids), (ids, settings, uniforms))

    def _generate_batch(self, batch: list[Request]) -> list[Answer]:
        prompts = [one.payload[0] for one in batch]
        uniform_keys = [one.payload[2] for one in batch]
        return generate(self.model, self.tokenizer, self._device, prompts, batch[0].payload[1], uniform_keys)

    def _note(self, requests: list[Instance], answers: list[Answer]) -> None:
        self.unanswered |= {
            (request.task_name, request.doc_id)
            for request, answer in zip(requests, answers, strict=True)
            if answer is None
        }


class Undivided(LM):
    """What `lm_eval.evaluate` is given: it sees one process with all documents, and the ranks divide the requests.

    Let lm-eval divide the documents itself, and the few-shot examples change with the number of ranks (one random series
    is drawn through a rank's documents), and more ranks than documents are an error.
    """

    def __init__(self, model: HarnessModel):
        super().__init__()
        self.whole = model
        self._device = model.device

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self.whole.loglikelihood(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self.whole.loglikelihood_rolling(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self.whole.generate_until(requests)
