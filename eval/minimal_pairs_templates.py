"""Templates of the minimal pairs: English phenomena, simple words, and a bad sentence that no standard speaker accepts.

Each function draws one (good, bad) pair; both have the same number of words and differ in as little as the phenomenon
allows. Left out on purpose: wordings whose "bad" form many accept ("less books", "there's two", "the team are", "has
drank", "The boy is home?"), names and nouns of open gender, and verbs that are also read another way.
"""

import random
from collections.abc import Callable

MAX_PAIRS = 200  # of a phenomenon
_DRAWS = 4000
Pair = tuple[str, str]  # good, bad

MEN = ("man", "boy", "king", "father", "brother", "uncle", "prince", "son")
WOMEN = ("woman", "girl", "queen", "mother", "sister", "aunt", "princess", "daughter")
MALE_NAMES = ("John", "Peter", "Tom", "David", "Henry", "Robert", "James", "William")
FEMALE_NAMES = ("Mary", "Anna", "Sarah", "Jane", "Emma", "Alice", "Susan", "Helen")
NAMES = MALE_NAMES + FEMALE_NAMES
PEOPLE = ("boy", "girl", "teacher", "student", "doctor", "farmer", "child", "king", "queen", "man", "woman", "friend", "neighbor",
          "sister", "brother", "lawyer", "writer", "singer")  # fmt: skip
THINGS = ("book", "key", "letter", "picture", "box", "chair", "table", "ball", "cup", "hat", "lamp", "flower", "stone", "coat")
_IRREGULAR_PLURALS = {"man": "men", "woman": "women", "child": "children", "box": "boxes", "princess": "princesses"}
INTRANSITIVE = (("sleep", "sleeps", "slept"), ("laugh", "laughs", "laughed"), ("smile", "smiles", "smiled"), ("swim", "swims", "swam"),
                ("sing", "sings", "sang"), ("dance", "dances", "danced"), ("work", "works", "worked"), ("walk", "walks", "walked"),
                ("cry", "cries", "cried"), ("run", "runs", "ran"))  # fmt: skip
TIMES = ("every day", "at night", "in the morning", "every week", "all day")
#: base, third person, past, participle, -ing, object. No verb whose past also serves as participle, or the reverse.
VERBS = (
    ("write", "writes", "wrote", "written", "writing", "the letter"), ("eat", "eats", "ate", "eaten", "eating", "the apple"),
    ("break", "breaks", "broke", "broken", "breaking", "the window"), ("take", "takes", "took", "taken", "taking", "the key"),
    ("steal", "steals", "stole", "stolen", "stealing", "the money"), ("drive", "drives", "drove", "driven", "driving", "the car"),
    ("draw", "draws", "drew", "drawn", "drawing", "the picture"), ("choose", "chooses", "chose", "chosen", "choosing", "the gift"),
    ("throw", "throws", "threw", "thrown", "throwing", "the ball"), ("see", "sees", "saw", "seen", "seeing", "the dog"),
    ("wear", "wears", "wore", "worn", "wearing", "the coat"), ("ride", "rides", "rode", "ridden", "riding", "the horse"),
    ("grow", "grows", "grew", "grown", "growing", "the flowers"), ("shake", "shakes", "shook", "shaken", "shaking", "the box"),
)  # fmt: skip
REFLEXIVE_VERBS = ("hurt", "saw", "blamed", "admired", "washed", "taught", "helped", "praised", "found", "hated")
TRANSITIVE_PAST = ("thanked", "helped", "visited", "called", "met", "hugged", "praised", "followed")
COUNT = ("books", "chairs", "students", "houses", "dogs", "roads", "questions", "mistakes", "letters", "doors", "cars", "trees")
MASS = ("water", "money", "furniture", "advice", "information", "traffic", "homework", "electricity", "luggage", "milk", "sand", "music")
PLACES = ("in the garden", "in the house", "at the station", "near the river", "behind the church", "in the room")
Draw = random.Random


def plural(noun: str) -> str:
    return _IRREGULAR_PLURALS.get(noun, noun + "s")


def make_pairs(phenomenon: str) -> list[Pair]:
    """Up to MAX_PAIRS distinct pairs, in an order that is the same on every machine; the first n are a fair sample."""
    draw = random.Random(f"minimal pairs {phenomenon}")
    pairs: dict[Pair, None] = {}
    for _ in range(_DRAWS):
        pairs[PHENOMENA[phenomenon](draw)] = None
        if len(pairs) == MAX_PAIRS:
            break
    return list(pairs)


def _both(frame: str, good: str, bad: str) -> Pair:
    """`frame` with its gap "_" filled; capitalized."""
    return tuple((text[0].upper() + text[1:]) for text in (frame.replace("_", good), frame.replace("_", bad)))  # type: ignore[return-value]


def _numbers(draw: Draw, noun: str) -> tuple[str, bool]:
    """(the noun in a number, whether it is singular)."""
    singular = draw.random() < 0.5
    return (noun if singular else plural(noun)), singular


def _agreeing(singular: bool, third: str, base: str) -> tuple[str, str]:
    return (third, base) if singular else (base, third)


def _two(draw: Draw, words: tuple[str, ...]) -> list[str]:
    return draw.sample(words, 2)


def _be(draw: Draw) -> tuple[str, str]:
    return draw.choice((("is", "are"), ("was", "were")))


# Agreement


def agreement_simple(draw: Draw) -> Pair:
    noun, singular = _numbers(draw, draw.choice(PEOPLE))
    base, third, _ = draw.choice(INTRANSITIVE)
    return _both(f"the {noun} _ {draw.choice(TIMES)}.", *_agreeing(singular, third, base))


def agreement_attractor(draw: Draw) -> Pair:
    head, other = _two(draw, THINGS)
    noun, singular = _numbers(draw, head)
    attractor = plural(other) if singular else other
    preposition = draw.choice(("near", "behind", "under", "next to"))
    adjective = draw.choice(("old", "new", "small", "heavy", "red", "beautiful"))
    return _both(f"the {noun} {preposition} the {attractor} _ {adjective}.", *_agreeing(singular, *_be(draw)))


def agreement_relative(draw: Draw) -> Pair:
    head, other = _two(draw, PEOPLE)
    noun, singular = _numbers(draw, head)
    subject = plural(other) if singular else other
    verb = draw.choice(("like", "know", "admire", "love", "help", "visit")) + ("" if singular else "s")
    base, third, _ = draw.choice(INTRANSITIVE)
    return _both(f"the {noun} that the {subject} {verb} _ {draw.choice(TIMES)}.", *_agreeing(singular, third, base))


def agreement_verb_coordination(draw: Draw) -> Pair:
    noun, singular = _numbers(draw, draw.choice(PEOPLE))
    first, second = draw.sample(INTRANSITIVE, 2)
    return _both(f"the {noun} {first[1] if singular else first[0]} every morning and _ at night.", *_agreeing(singular, second[1], second[0]))


def agreement_conjoined_subject(draw: Draw) -> Pair:
    first, second = _two(draw, PEOPLE)
    good, bad = draw.choice((("are", "is"), ("were", "was")))
    return _both(f"the {first} and the {second} _ {draw.choice(('happy', 'tired', 'hungry', 'very old', 'late'))}.", good, bad)


# Anaphora


def reflexive_gender(draw: Draw) -> Pair:
    male = draw.random() < 0.5
    nouns, names = (MEN, MALE_NAMES) if male else (WOMEN, FEMALE_NAMES)
    subject = draw.choice([*names, *(f"the {noun}" for noun in nouns)])
    forms = ("himself", "herself") if male else ("herself", "himself")
    return _both(f"{subject} {draw.choice(REFLEXIVE_VERBS)} _.", *forms)


def reflexive_number(draw: Draw) -> Pair:
    nouns, own = draw.choice(((MEN, "himself"), (WOMEN, "herself")))
    noun, singular = _numbers(draw, draw.choice(nouns))
    return _both(f"the {noun} {draw.choice(REFLEXIVE_VERBS)} _.", *_agreeing(singular, own, "themselves"))


def reflexive_locality(draw: Draw) -> Pair:
    nouns, own = draw.choice(((MEN, "himself"), (WOMEN, "herself")))
    noun, singular = _numbers(draw, draw.choice(nouns))
    outer = plural(draw.choice(PEOPLE)) if singular else draw.choice(nouns)
    frame = f"the {outer} {draw.choice(('said', 'thought', 'knew'))} that the {noun} {draw.choice(REFLEXIVE_VERBS)} _."
    return _both(frame, *_agreeing(singular, own, "themselves"))


def reciprocal(draw: Draw) -> Pair:
    noun = draw.choice(PEOPLE)
    return _both(f"the _ {draw.choice(TRANSITIVE_PAST)} each other.", plural(noun), noun)


# Nouns and their company


def determiner_noun(draw: Draw) -> Pair:
    return _determiner(draw, "")


def determiner_noun_adjective(draw: Draw) -> Pair:
    return _determiner(draw, draw.choice(("old ", "new ", "small ", "heavy ", "red ", "beautiful ")))


def _determiner(draw: Draw, adjective: str) -> Pair:
    noun = draw.choice(THINGS)
    determiner, singular = draw.choice((("this", True), ("that", True), ("these", False), ("those", False)))
    verb = draw.choice(("bought", "lost", "sold", "moved", "carried"))
    return _both(f"{draw.choice(NAMES)} {verb} {determiner} {adjective}_.", *_agreeing(singular, noun, plural(noun)))


def quantifier(draw: Draw) -> Pair:
    name, mass, count = draw.choice(NAMES), draw.choice(MASS), draw.choice(COUNT)
    place = draw.choice(PLACES)
    return draw.choice((
        _both(f"there was too _ {mass} {place}.", "much", "many"), _both(f"there were too _ {count} {place}.", "many", "much"),
        _both(f"{name} has very _ {mass}.", "little", "few"), _both(f"{name} does not have _ {count}.", "many", "much"),
        _both(f"{name} does not have _ {mass}.", "much", "many"), _both(f"{name} has _ {mass} than {draw.choice(('Mark', 'Kate', 'Paul'))}.", "less", "fewer"),
    ))  # fmt: skip


def article(draw: Draw) -> Pair:
    vowel = ("apple", "egg", "orange", "umbrella", "island", "engine", "onion", "elephant", "artist", "old house", "ugly dog", "empty box",
             "open door", "easy question", "interesting book")  # fmt: skip
    consonant = ("book", "dog", "house", "car", "table", "young artist", "big apple", "small island", "letter", "tree", "white egg", "river")
    name, verb = draw.choice(NAMES), draw.choice(("saw", "found", "had", "remembered", "mentioned"))
    if draw.random() < 0.5:
        return _both(f"{name} {verb} _ {draw.choice(vowel)}.", "an", "a")
    return _both(f"{name} {verb} _ {draw.choice(consonant)}.", "a", "an")


def adjective_order(draw: Draw) -> Pair:
    noun, adjective = draw.choice(PEOPLE), draw.choice(("old", "young", "tall", "happy", "small", "poor"))
    tail = f"{draw.choice(INTRANSITIVE)[2]} {draw.choice(TIMES)}"
    return _both(f"the _ {tail}.", f"{adjective} {noun}", f"{noun} {adjective}")


def comparative(draw: Draw) -> Pair:
    first, second = _two(draw, PEOPLE)
    adjective, more = draw.choice((("tall", "taller"), ("old", "older"), ("young", "younger"), ("strong", "stronger"), ("short", "shorter")))
    if draw.random() < 0.5:
        return _both(f"the {first} is _ than the {second}.", more, adjective)
    return _both(f"the {first} is as _ as the {second}.", adjective, more)


def existential_there(draw: Draw) -> Pair:
    noun = draw.choice(PEOPLE + THINGS[:8])
    if draw.random() < 0.5:
        return _both(f"there was _ {noun} {draw.choice(PLACES)}.", "a", draw.choice(("every", "each")))
    return _both(f"there were _ {plural(noun)} {draw.choice(PLACES)}.", draw.choice(("two", "many", "some")), draw.choice(("most", "all")))


def noun_ellipsis(draw: Draw) -> Pair:
    first, second = _two(draw, NAMES)
    verb, noun = draw.choice(("bought", "found", "sold", "lost")), draw.choice(THINGS)
    adjective, number = draw.choice(("red", "old", "new", "small", "heavy")), draw.choice(("two", "three", "four"))
    return (f"{first} {verb} one {adjective} {noun} and {second} {verb} {number}.",
            f"{first} {verb} one {noun} and {second} {verb} {number} {adjective}.")  # fmt: skip


# Verb forms and arguments


def _subject(draw: Draw) -> str:
    return draw.choice([*NAMES, *(f"the {noun}" for noun in PEOPLE)])


def do_support(draw: Draw) -> Pair:
    base, _, past, _, _, thing = draw.choice(VERBS)
    frame = draw.choice((f"{_subject(draw)} did not _ {thing}.", f"did {_subject(draw)} _ {thing}?"))
    return _both(frame, base, past)


def past_form(draw: Draw) -> Pair:
    _, _, past, participle, _, thing = draw.choice(VERBS)
    return _both(f"{_subject(draw)} _ {thing} {draw.choice(('yesterday', 'last week', 'last year'))}.", past, participle)


def participle_form(draw: Draw) -> Pair:
    _, _, past, participle, _, thing = draw.choice(VERBS)
    return _both(f"{_subject(draw)} {draw.choice(('has', 'had'))} _ {thing}.", participle, past)


def passive_participle(draw: Draw) -> Pair:
    _, _, past, participle, _, thing = draw.choice([verb for verb in VERBS if not verb[5].endswith("s")])
    return _both(f"{thing} was _ by {_subject(draw)}.", participle, past)


def modal_form(draw: Draw) -> Pair:
    base, third, past, participle, _, thing = draw.choice(VERBS)
    modal = draw.choice(("will", "can", "should", "must", "could"))
    return _both(f"{_subject(draw)} {modal} _ {thing}.", base, draw.choice((third, past, participle)))


def infinitive_form(draw: Draw) -> Pair:
    base, third, past, participle, _, thing = draw.choice(VERBS)
    verb = draw.choice(("wants", "tried", "decided", "hopes", "wanted"))
    return _both(f"{_subject(draw)} {verb} to _ {thing}.", base, draw.choice((third, past, participle)))


def progressive_form(draw: Draw) -> Pair:
    base, third, past, _, progressive, thing = draw.choice([verb for verb in VERBS if verb[0] != "see"])
    return _both(f"{_subject(draw)} {draw.choice(('is', 'was'))} _ {thing}.", progressive, draw.choice((base, third, past)))


def pronoun_case(draw: Draw) -> Pair:
    subject, other = draw.choice((("I", "me"), ("he", "him"), ("she", "her"), ("we", "us"), ("they", "them")))
    verb = draw.choice(TRANSITIVE_PAST)
    place = draw.choice(PLACES)
    return draw.choice((
        _both(f"_ {verb} {draw.choice(NAMES)} {place}.", subject, other), _both(f"{draw.choice(NAMES)} {verb} _ {place}.", other, subject),
        _both(f"the {draw.choice(THINGS)} {place} is for _.", other, subject),
    ))  # fmt: skip


def transitivity(draw: Draw) -> Pair:
    good = draw.choice(TRANSITIVE_PAST)
    bad = draw.choice(("arrived", "slept", "smiled", "coughed", "sneezed", "fainted", "existed", "laughed"))
    first, second = _two(draw, PEOPLE)
    return _both(draw.choice((f"the {first} _ the {second}.", f"the {first} was _ by the {second}.")), good, bad)


# Licensing and movement


def npi_ever(draw: Draw) -> Pair:
    _, _, _, participle, _, thing = draw.choice(VERBS)
    if draw.random() < 0.3:
        return _both(f"_ has ever {participle} {thing}.", "nobody", "somebody")
    return _both(f"_ {draw.choice(PEOPLE)} has ever {participle} {thing}.", "no", draw.choice(("some", "every", "this")))


def npi_any(draw: Draw) -> Pair:
    verb, thing = draw.choice(("bought", "found", "lost", "sold", "moved")), plural(draw.choice(THINGS))
    return draw.choice((
        _both(f"_ {verb} any {thing}.", "nobody", "somebody"),
        _both(f"_ {draw.choice(PEOPLE)} {verb} any {thing}.", "no", draw.choice(("some", "every", "this"))),
        _both(f"_ {draw.choice(NAMES)} {verb} any {thing}.", "only", "even"),
    ))  # fmt: skip


def question_inversion(draw: Draw) -> Pair:
    subject, auxiliary = f"the {draw.choice(PEOPLE)}", draw.choice(("will", "can", "should", "must", "did"))
    wh, verb = draw.choice((("what", draw.choice(("buy", "find", "see", "write", "choose"))),
                            (draw.choice(("when", "where", "why")), draw.choice(("sleep", "work", "sing", "swim")))))  # fmt: skip
    return _both(f"{wh} _ {verb}?", f"{auxiliary} {subject}", f"{subject} {auxiliary}")


def filler_gap(draw: Draw) -> Pair:
    subject, verb = draw.choice(PEOPLE), draw.choice(("found", "fixed", "carried", "caught", "destroyed", "built", "made"))
    frame = f"{draw.choice(NAMES)} {draw.choice(('knows', 'remembers', 'forgot', 'discovered'))} _ the {subject} {verb}"
    if draw.random() < 0.5:
        return _both(f"{frame}.", "what", "that")
    return _both(f"{frame} the {draw.choice(THINGS)}.", "that", "what")


def adjunct_island(draw: Draw) -> Pair:
    first, second = _two(draw, NAMES)
    verb = draw.choice(("call", "thank", "hug", "help", "visit"))
    clause = f"{draw.choice(('before', 'after'))} {'he' if first in MALE_NAMES else 'she'} {draw.choice(('met', 'saw', 'heard', 'left'))}"
    return _both(f"who did {first} {verb} _?", f"{clause} {second}", f"{second} {clause}")


def coordination_island(draw: Draw) -> Pair:
    first, second = _two(draw, NAMES)
    verb = draw.choice(("see", "call", "help", "visit", "meet"))
    return _both(f"who did {first} _?", f"and {second} {verb}", f"{verb} {second} and")


_FUNCTIONS: tuple[Callable[[Draw], Pair], ...] = (
    agreement_simple, agreement_attractor, agreement_relative, agreement_verb_coordination, agreement_conjoined_subject,
    reflexive_gender, reflexive_number, reflexive_locality, reciprocal, determiner_noun, determiner_noun_adjective, quantifier,
    article, adjective_order, comparative, existential_there, noun_ellipsis, do_support, past_form, participle_form,
    passive_participle, modal_form, infinitive_form, progressive_form, pronoun_case, transitivity, npi_ever, npi_any,
    question_inversion, filler_gap, adjunct_island, coordination_island,
)  # fmt: skip
PHENOMENA = {function.__name__: function for function in _FUNCTIONS}
