"""The synthetic language: a stochastic grammar compiled to a finite automaton, so that everything about it is exact.

The words read so far determine the state, and sentences are bounded in length: the automaton has no cycle. The true
next-token distribution, the probability of a sentence, the entropy (visits of each state times its entropy), unigrams,
bigrams and the most probable sentences follow in float64 without sampling. Logarithms are natural (nats).
"""

import hashlib
import heapq
import json
import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from .synthetic_grammar import (
    END_GROUP,
    GRAMMAR_VERSION,
    START,
    GrammarSize,
    Symbol,
    expand,
    make_words,
    verb_orders,
    zipf,
)
from .tokenizer import SPECIAL_TOKENS, UNKNOWN, word_tokenizer

BOS_ID, EOS_ID, PAD_ID, UNKNOWN_ID = 0, 1, 2, 3
_FIRST_WORD = 4


@dataclass(frozen=True)
class Arc:
    """A transition: probability, group of words, its word distribution's key, next state, and where symbols came from.

    origins[i] is the index in the old stack that symbol i of the new stack goes back to, or -1 for this very word;
    controller is that index for the symbol that emitted the word.
    """

    probability: float
    group: tuple
    emission: tuple
    target: int
    origins: tuple[int, ...]
    controller: int


@dataclass(frozen=True)
class AgreementSite:
    """A word that agrees in number with a noun before it.

    position: index in the sentence (without BOS); distance: words from the noun to it; attractors: nouns of the other
    number in between; correct and wrong: ids of the forms with the right and with the wrong number.
    """

    position: int
    distance: int
    attractors: int
    correct: tuple[int, ...]
    wrong: tuple[int, ...]


class SyntheticLanguage:
    """A language with Zipfian words and agreement over distance. Ids: 0 BOS, 1 EOS, 2 padding, 3 unknown, then words.

    A sentence is a list of word ids that ends with EOS; a BOS in front is accepted everywhere and has no probability.
    """

    def __init__(self, seed: int = 0, **size: Any) -> None:
        """`size`: fields of GrammarSize. The same arguments give the same language on every machine."""
        self.seed = seed
        self.size = GrammarSize(**size)
        self.size.check()
        words = make_words(self.size, seed)
        self.vocabulary = [*SPECIAL_TOKENS, UNKNOWN] + [word for group in words.values() for word in group]
        self.vocab_size = len(self.vocabulary)
        self._groups: dict[tuple, list[int]] = {END_GROUP: [EOS_ID]}
        first = _FIRST_WORD
        for group, members in words.items():
            self._groups[group] = list(range(first, first + len(members)))
            first += len(members)
        self._group_of = {index: group for group, members in self._groups.items() for index in members}
        self._orders = verb_orders(self.size, seed)
        self._emissions: dict[tuple, np.ndarray] = {}
        self._arcs: list[dict[tuple, Arc]] = self._compile()

    # Building

    def _compile(self) -> list[dict[tuple, Arc]]:
        """Arcs by group for each state; state 0 is the start and the last state, without arcs, is the end."""
        stacks: dict[tuple[Symbol, ...], int] = {(START,): 0}
        queue: list[tuple[Symbol, ...]] = [(START,)]
        table: list[dict[tuple, Arc]] = []
        for stack in queue:
            arcs: dict[tuple, Arc] = {}
            for probability, (group, noun_class), entries, controller in self._emitting(stack):
                target = tuple(symbol for symbol, _ in entries)
                if target not in stacks:
                    stacks[target] = len(queue)
                    queue.append(target)
                if group in arcs:
                    raise ValueError(f"grammar: two rules emit {group} after {stack}")
                arcs[group] = Arc(probability, group, self._emission(group, noun_class), stacks[target],
                                  tuple(origin for _, origin in entries), controller)
            table.append(arcs)
        return table

    def _emitting(self, stack: tuple[Symbol, ...]) -> Iterator[tuple[float, tuple, list[tuple[Symbol, int]], int]]:
        """(probability, (group, class), new stack with origins, controller) of every way to emit the next word."""
        agenda = [(1.0, [(symbol, index) for index, symbol in enumerate(stack)])]
        while agenda:
            mass, entries = agenda.pop()
            if not entries:
                continue
            (symbol, origin), rest = entries[0], entries[1:]
            for probability, word, pushed in expand(symbol, self.size):
                if word is None:
                    agenda.append((mass * probability, [(new, origin) for new in pushed] + rest))
                    continue
                source = -1 if word[0][0] == "noun" else origin
                yield mass * probability, word, [(new, source) for new in pushed] + rest, origin

    def _emission(self, group: tuple, noun_class: int | None) -> tuple:
        """Key of the distribution over the words of a group (np.ndarray [words of the group]), made on first use."""
        key = (group, noun_class)
        if key not in self._emissions:
            law = zipf(len(self._groups[group]), self.size.zipf_exponent)
            ranks = range(len(law)) if noun_class is None else self._orders[group[0], noun_class]
            self._emissions[key] = np.array([law[rank] for rank in ranks])
        return key

    # Exact quantities

    @cached_property
    def visits(self) -> np.ndarray:
        """Expected number of visits of each state in a sentence; the end state, of no token, has 0."""
        order, remaining = [0], np.zeros(len(self._arcs), dtype=int)
        for arcs in self._arcs:
            for arc in arcs.values():
                remaining[arc.target] += 1
        visits = np.zeros(len(self._arcs))
        visits[0] = 1.0
        for state in order:  # topological: a state follows once all arcs into it are done
            for arc in self._arcs[state].values():
                visits[arc.target] += visits[state] * arc.probability
                remaining[arc.target] -= 1
                if remaining[arc.target] == 0:
                    order.append(arc.target)
        visits[[not arcs for arcs in self._arcs]] = 0.0
        return visits

    @property
    def mean_length(self) -> float:
        """Expected tokens of a sentence, EOS included."""
        return float(self.visits.sum())

    @cached_property
    def state_entropies(self) -> np.ndarray:
        """Entropy of the next token in each state, nats."""
        word_entropy = {key: float(-(law * np.log(law)).sum()) for key, law in self._emissions.items()}
        return np.array([
            sum(arc.probability * (word_entropy[arc.emission] - math.log(arc.probability)) for arc in arcs.values())
            for arcs in self._arcs])

    @property
    def sentence_entropy(self) -> float:
        """Entropy of the distribution over sentences, nats."""
        return float(self.visits @ self.state_entropies)

    def stationary(self) -> np.ndarray:
        """Share of tokens drawn in each state, in an endless stream of sentences."""
        return self.visits / self.mean_length

    def entropy_rate(self) -> float:
        """Nats per token (EOS counted, BOS not) of an endless stream of sentences: no model's cross-entropy is lower."""
        return float(self.stationary() @ self.state_entropies)

    def _distribution(self, state: int) -> np.ndarray:
        probabilities = np.zeros(self.vocab_size)
        for arc in self._arcs[state].values():
            probabilities[self._groups[arc.group]] = arc.probability * self._emissions[arc.emission]
        return probabilities

    def next_token_distribution(self, prefix_ids: Sequence[int]) -> np.ndarray:
        """P(next token | prefix), float64 [V]. ValueError if the prefix cannot begin a sentence, or already ends one."""
        states = self._states(prefix_ids)
        if states is None or not self._arcs[states[-1]]:
            raise ValueError(f"not the beginning of a sentence: {self.text(prefix_ids)!r}")
        return self._distribution(states[-1])

    def unigram(self) -> np.ndarray:
        """P(token), float64 [V], EOS included and BOS not."""
        probabilities = np.zeros(self.vocab_size)
        for share, arcs in zip(self.stationary(), self._arcs, strict=True):
            for arc in arcs.values():
                probabilities[self._groups[arc.group]] += share * arc.probability * self._emissions[arc.emission]
        return probabilities

    def bigram(self) -> np.ndarray:
        """P(token and the one after it), float64 [V, V]; row BOS holds the first tokens. Sums to 1."""
        following: dict[tuple, np.ndarray] = {}
        joint = np.zeros((self.vocab_size, self.vocab_size))
        stationary = self.stationary()
        joint[BOS_ID] = stationary[0] * self._distribution(0)
        distributions = [self._distribution(state) for state in range(len(self._arcs))]
        for share, arcs in zip(stationary, self._arcs, strict=True):
            for arc in arcs.values():
                after = following.setdefault((arc.group, arc.emission), np.zeros(self.vocab_size))
                after += share * arc.probability * distributions[arc.target]
        for (group, emission), after in following.items():
            joint[self._groups[group]] += np.outer(self._emissions[emission], after)
        return joint

    # Sentences

    def _words(self, ids: Sequence[int]) -> list[int]:
        ids = [int(index) for index in ids]
        return ids[1:] if ids[:1] == [BOS_ID] else ids

    def _states(self, ids: Sequence[int]) -> list[int] | None:
        """The states before each word and after the last; None if some word is impossible."""
        states = [0]
        for index in self._words(ids):
            arc = self._arcs[states[-1]].get(self._group_of.get(index, ()))
            if arc is None:
                return None
            states.append(arc.target)
        return states

    def is_grammatical(self, ids: Sequence[int], complete: bool = True) -> bool:
        """Whether `ids` are a sentence up to its EOS; with complete=False, whether they can begin one."""
        states = self._states(ids)
        return states is not None and (not complete or not self._arcs[states[-1]])

    def token_logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """log P of each token given those before it, float64 [tokens without BOS]; -inf from an impossible one on."""
        words = self._words(ids)
        logprobs = np.full(len(words), -np.inf)
        state = 0
        for position, index in enumerate(words):
            group = self._group_of.get(index, ())
            arc = self._arcs[state].get(group)
            if arc is None:
                break
            word = self._emissions[arc.emission][index - self._groups[group][0]]
            logprobs[position] = math.log(arc.probability) + math.log(word)
            state = arc.target
        return logprobs

    def sequence_logprob(self, ids: Sequence[int]) -> float:
        """log P(ids): of the sentence if they end with EOS, else of all sentences that begin so. -inf if impossible."""
        return float(self.token_logprobs(ids).sum())

    def sample(self, n_sentences: int | None = None, n_tokens: int | None = None, seed: int = 0) -> list[list[int]]:
        """Sentences: that many, or until they have `n_tokens` tokens (EOS counted). The same on every machine."""
        if (n_sentences is None) == (n_tokens is None):
            raise ValueError("give n_sentences or n_tokens")
        draw = random.Random(f"synthetic sample {self.seed} {seed}").random
        sentences: list[list[int]] = []
        tokens = 0
        while len(sentences) < n_sentences if n_sentences is not None else tokens < n_tokens:
            sentences.append(self._sample_sentence(draw))
            tokens += len(sentences[-1])
        return sentences

    def _sample_sentence(self, draw: Any) -> list[int]:
        state, ids = 0, []
        arcs_cumulative, words_cumulative = self._cumulative
        while arcs_cumulative[state]:
            arcs, cumulative = arcs_cumulative[state]
            arc = arcs[min(bisect_right(cumulative, draw()), len(arcs) - 1)]
            words = words_cumulative[arc.emission]
            ids.append(self._groups[arc.group][min(bisect_right(words, draw()), len(words) - 1)])
            state = arc.target
        return ids

    @cached_property
    def _cumulative(self) -> tuple[list, dict[tuple, list[float]]]:
        states = [(list(arcs.values()), list(accumulate(arc.probability for arc in arcs.values()))) if arcs else None
                  for arcs in self._arcs]
        return states, {key: list(accumulate(law.tolist())) for key, law in self._emissions.items()}

    def modes(self, k: int) -> list[tuple[list[int], float]]:
        """The `k` most probable sentences and their log-probabilities, best first, by an exact best-first search."""
        best, options = self._best_completions
        heap: list[tuple[float, list[int], int, int, float]] = [(-best[0], [], 0, 0, 0.0)]
        found: list[tuple[list[int], float]] = []
        while heap and len(found) < k:
            _, ids, state, rank, so_far = heapq.heappop(heap)
            if not options[state]:
                found.append((ids, so_far))
                continue
            bound, logprob, index, target = options[state][rank]
            if rank + 1 < len(options[state]):
                heapq.heappush(heap, (-(so_far + options[state][rank + 1][0]), ids, state, rank + 1, so_far))
            heapq.heappush(heap, (-(so_far + bound), [*ids, index], target, 0, so_far + logprob))
        return found

    @cached_property
    def _best_completions(self) -> tuple[np.ndarray, list[list[tuple[float, float, int, int]]]]:
        """Per state: log P of the best completion, and (bound, logprob, id, target) of every word, best first."""
        best = np.full(len(self._arcs), np.nan)
        options: list[list[tuple[float, float, int, int]]] = [[] for _ in self._arcs]
        pending = [0]
        while pending:  # a depth-first post-order: a state after all its targets
            state = pending[-1]
            arcs = self._arcs[state].values()
            waiting = [arc.target for arc in arcs if np.isnan(best[arc.target])]
            if waiting:
                pending.extend(waiting)
                continue
            pending.pop()
            if not np.isnan(best[state]):
                continue
            for arc in arcs:
                logs = np.log(self._emissions[arc.emission]) + math.log(arc.probability)
                options[state] += [(float(log + best[arc.target]), float(log), index, arc.target)
                                   for index, log in zip(self._groups[arc.group], logs, strict=True)]
            options[state].sort(key=lambda option: (-option[0], option[2]))
            best[state] = options[state][0][0] if options[state] else 0.0
        return best, options

    def agreement_sites(self, ids: Sequence[int]) -> list[AgreementSite]:
        """Every verb and reflexive of a sentence, or of a beginning of one, in order. ValueError for anything else."""
        states = self._states(ids)
        if states is None:
            raise ValueError(f"not the beginning of a sentence: {self.text(ids)!r}")
        words = self._words(ids)
        sites: list[AgreementSite] = []
        heads = [-1]  # for each symbol of the stack, the position of the noun that it goes back to
        for position, (index, state) in enumerate(zip(words, states, strict=False)):  # one state more
            arc = self._arcs[state][self._group_of[index]]
            if arc.group[0] in ("transitive", "intransitive", "reflexive"):
                sites.append(self._site(words, position, heads[arc.controller], state, arc.group))
            heads = [position if origin < 0 else heads[origin] for origin in arc.origins]
        return sites

    def _site(self, words: list[int], position: int, head: int, state: int, group: tuple) -> AgreementSite:
        number = group[1]
        kinds = ("reflexive",) if group[0] == "reflexive" else ("transitive", "intransitive")
        groups = [(kind, number) for kind in kinds if (kind, number) in self._arcs[state]]
        correct = tuple(index for each in groups for index in self._groups[each])
        wrong = tuple(self.counterpart[index] for index in correct)
        between = [self._group_of[index] for index in words[head + 1 : position]]
        attractors = sum(other[0] == "noun" and other[1] != number for other in between)
        return AgreementSite(position, position - head, attractors, correct, wrong)

    @cached_property
    def counterpart(self) -> dict[int, int]:
        """The other number's form of every noun, verb and reflexive."""
        other = {"sg": "pl", "pl": "sg"}
        pairs = {}
        for group, members in self._groups.items():
            if group[0] in ("noun", "transitive", "intransitive", "reflexive"):
                pairs |= zip(members, self._groups[(group[0], other[group[1]], *group[2:])], strict=True)
        return pairs

    # Text

    def text(self, ids: Sequence[int]) -> str:
        """Words joined by spaces, special tokens left out."""
        return " ".join(self.vocabulary[index] for index in ids if index >= _FIRST_WORD)

    def tokenizer(self) -> Any:
        """The word-level tokenizer (PreTrainedTokenizerFast) whose ids are the language's; puts BOS before a text."""
        return word_tokenizer(self.vocabulary[_FIRST_WORD:])

    def fingerprint(self) -> str:
        """sha256 hex of what defines the language."""
        content = [GRAMMAR_VERSION, self.seed, asdict(self.size), self.vocabulary]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
