"""The grammar of the synthetic language: its rules, its words and how likely they are.

A sentence is derived leftmost-first from a stack of symbols. A symbol is a tuple (kind, *features); `expand` gives its
rules. Features carry number ("sg", "pl") and noun class down to the verbs and reflexives that agree with a noun. Every
word belongs to one group, and no two rules that compete emit the same group: the words read so far determine the stack.
"""

import random
from dataclasses import dataclass

Symbol = tuple
Rule = tuple[float, tuple | None, tuple[Symbol, ...]]  # probability, (group, noun class or None) or None, symbols pushed

GRAMMAR_VERSION = 1
START: Symbol = ("SENTENCE",)
END_GROUP = ("end",)
NUMBERS = ("sg", "pl")
_SINGULAR = 0.6
_CLOSED = {
    ("determiner", "any"): ("the", "our"), ("determiner", "sg"): ("a", "this", "every"),
    ("determiner", "pl"): ("some", "these", "many"), ("that",): ("that",), ("and",): ("and",),
    ("reflexive", "sg"): ("itself",), ("reflexive", "pl"): ("themselves",),
}
_PREPOSITIONS = ("of", "near", "with", "under", "behind", "beside", "above", "without", "beyond", "against", "inside",
                 "across")


@dataclass(frozen=True)
class GrammarSize:
    """Number of stems per kind (nouns: per class; verbs: transitive and intransitive each), and the shape of the law.

    max_depth bounds the nesting of modifiers, max_adjectives those of a noun, max_conjuncts the verbs after "and"; word
    probabilities fall as rank ** -zipf_exponent within their group.
    """

    nouns: int = 60
    classes: int = 2
    verbs: int = 40
    adjectives: int = 40
    adverbs: int = 20
    prepositions: int = 8
    max_depth: int = 2
    max_adjectives: int = 2
    max_conjuncts: int = 1
    zipf_exponent: float = 1.0

    def check(self) -> None:
        counts = (self.nouns, self.classes, self.verbs, self.adjectives, self.adverbs, self.prepositions)
        bounds = (self.max_depth, self.max_adjectives, self.max_conjuncts)
        if min(counts) < 1 or min(bounds) < 0 or self.prepositions > len(_PREPOSITIONS):
            raise ValueError(f"{self}: counts must be at least 1 (prepositions at most {len(_PREPOSITIONS)}), bounds at "
                             "least 0")


def expand(symbol: Symbol, size: GrammarSize) -> list[Rule]:
    """The rules of `symbol`; their probabilities sum to 1."""
    kind, *features = symbol
    return _RULES[kind](size, *features)


def _sentence(size: GrammarSize) -> list[Rule]:
    subject = ("NOUN_PHRASE", "subject", size.max_depth)
    return [(0.15, (("adverb",), None), (subject, ("END",))), (0.85, None, (subject, ("END",)))]


def _noun_phrase(size: GrammarSize, role: str, depth: int) -> list[Rule]:
    shares = {"any": 0.6, "sg": 0.24, "pl": 0.16}
    return [(share, (("determiner", number), None), (("NOUN", role, depth, number, 0),))
            for number, share in shares.items()]


def _noun(size: GrammarSize, role: str, depth: int, determiner: str, adjectives: int) -> list[Rule]:
    numbers = {"any": {"sg": _SINGULAR, "pl": 1 - _SINGULAR}}.get(determiner, {determiner: 1.0})
    p_adjective = 0.25 if adjectives < size.max_adjectives else 0.0
    rules: list[Rule] = []
    if p_adjective:
        rules.append((p_adjective, (("adjective",), None), (("NOUN", role, depth, determiner, adjectives + 1),)))
    for number, p_number in numbers.items():
        for noun_class, p_class in enumerate(zipf(size.classes, size.zipf_exponent)):
            pushed = (("MODIFIER", number, noun_class, depth),) if depth else ()
            if role == "subject":
                pushed += (("VERB_PHRASE", number, noun_class, size.max_conjuncts),)
            elif role == "relative":
                pushed += (("RELATIVE_VERB", number, noun_class),)
            rules.append(((1 - p_adjective) * p_number * p_class, (("noun", number, noun_class), None), pushed))
    return rules


def _modifier(size: GrammarSize, number: str, noun_class: int, depth: int) -> list[Rule]:
    return [(0.22, (("preposition",), None), (("NOUN_PHRASE", "object", depth - 1),)),
            (0.18, (("that",), None), (("RELATIVE", number, noun_class, depth),)), (0.6, None, ())]


def _relative(size: GrammarSize, number: str, noun_class: int, depth: int) -> list[Rule]:
    return [(0.4, (("transitive", number), noun_class), (("NOUN_PHRASE", "object", depth - 1),)),
            (0.2, (("intransitive", number), noun_class), ()), (0.4, None, (("NOUN_PHRASE", "relative", depth - 1),))]


def _relative_verb(size: GrammarSize, number: str, noun_class: int) -> list[Rule]:
    return [(1.0, (("transitive", number), noun_class), ())]


def _verb_phrase(size: GrammarSize, number: str, noun_class: int, conjuncts: int) -> list[Rule]:
    tail = ("TAIL", number, noun_class, conjuncts)
    return [(0.6, (("transitive", number), noun_class), (("OBJECT", number), tail)),
            (0.4, (("intransitive", number), noun_class), (tail,))]


def _object(size: GrammarSize, number: str) -> list[Rule]:
    return [(0.15, (("reflexive", number), None), ()),
            (0.85, None, (("NOUN_PHRASE", "object", max(0, size.max_depth - 1)),))]


def _tail(size: GrammarSize, number: str, noun_class: int, conjuncts: int) -> list[Rule]:
    conjunction = (("CONJUNCTION", number, noun_class, conjuncts),) if conjuncts else ()
    return [(0.25, (("adverb",), None), conjunction), (0.75, None, conjunction)]


def _conjunction(size: GrammarSize, number: str, noun_class: int, conjuncts: int) -> list[Rule]:
    return [(0.2, (("and",), None), (("VERB_PHRASE", number, noun_class, conjuncts - 1),)), (0.8, None, ())]


_RULES = {
    "SENTENCE": _sentence, "NOUN_PHRASE": _noun_phrase, "NOUN": _noun, "MODIFIER": _modifier, "RELATIVE": _relative,
    "RELATIVE_VERB": _relative_verb, "VERB_PHRASE": _verb_phrase, "OBJECT": _object, "TAIL": _tail,
    "CONJUNCTION": _conjunction, "END": lambda size: [(1.0, (END_GROUP, None), ())],
}


def zipf(count: int, exponent: float) -> list[float]:
    """Probabilities proportional to rank ** -exponent, rank 1..count."""
    weights = [rank**-exponent for rank in range(1, count + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def make_words(size: GrammarSize, seed: int) -> dict[tuple, list[str]]:
    """The words of each open and closed group, commonest first. Pseudo-words, the same for the same seed everywhere."""
    generator = random.Random(f"synthetic words {seed}")
    used = {word for words in _CLOSED.values() for word in words} | set(_PREPOSITIONS)
    groups: dict[tuple, list[str]] = {group: list(words) for group, words in _CLOSED.items()}
    groups[("preposition",)] = list(_PREPOSITIONS[: size.prepositions])
    for noun_class in range(size.classes):
        stems = _stems(generator, used, size.nouns, "oa")
        groups[("noun", "sg", noun_class)] = stems
        groups[("noun", "pl", noun_class)] = [stem + "s" for stem in stems]
    for kind in ("transitive", "intransitive"):
        stems = _stems(generator, used, size.verbs, "tkn")
        groups[(kind, "sg")] = [stem + "s" for stem in stems]
        groups[(kind, "pl")] = stems
    groups[("adjective",)] = _stems(generator, used, size.adjectives, ("ish", "ful"))
    groups[("adverb",)] = _stems(generator, used, size.adverbs, ("ly",))
    return groups


def _stems(generator: random.Random, used: set[str], count: int, endings: str | tuple[str, ...]) -> list[str]:
    stems: list[str] = []
    while len(stems) < count:
        syllables = generator.choice((1, 2, 2)) if len(used) < 300 else 2 if len(used) < 3000 else 3
        stem = "".join(generator.choice("bdfghjklmnprstvwz") + generator.choice("aeiou") for _ in range(syllables))
        stem += generator.choice("lmnr") + generator.choice(endings)
        if stem not in used and stem + "s" not in used:
            used.update((stem, stem + "s"))
            stems.append(stem)
    return stems


def verb_orders(size: GrammarSize, seed: int) -> dict[tuple[str, int], list[int]]:
    """For (verb kind, noun class): the rank of each verb. Every class of nouns prefers verbs of its own."""
    generator = random.Random(f"synthetic verbs {seed}")
    return {(kind, noun_class): generator.sample(range(size.verbs), size.verbs)
            for kind in ("transitive", "intransitive") for noun_class in range(size.classes)}
