"""Messages and instructions of the village of `synthetic`, generated from a seed and never stored.

A message is a short note with a label; the task is to tell what kind of note it is. An instruction has an input (which
may be empty) and an output that follows from both and from what the stories tell of the village: who eats what, where
honey comes from, who the baker is, how a feeling shows.

Every row is made of facts, words that belong together in it, such as (kite, red). A hash of the fact, not of the
seed, says whether it belongs to train, validation or test. So a row of the test split holds no fact that any training
row of any seed holds, while all of its words and phrases occur there. Randomness is that of `synthetic`.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from hfgpt.data.synthetic import (
    ANIMALS,
    CHILDREN,
    COLOURS,
    FEELINGS,
    FOODS,
    GROWN_UPS,
    INGREDIENTS,
    PLACES,
    THINGS,
    person_words,
    pick,
    pick_two,
    thing_words,
    with_article,
)

SPLITS = ("train",) * 8 + ("validation", "test")  # of each ten facts


class Verb(NamedTuple):
    name: str
    past: str


class Task(NamedTuple):
    """One row of an instruction data set."""

    instruction: str
    input: str
    output: str


# fmt: off
GREETINGS = (
    "[Hello|Good morning|Listen|Dear friends|Dear {name2}]!", "{name2}, [please read this|I must tell you something].",
)
GOODBYES = ("Your [old |good |]friend {name}.", "{name}, near the {place}.", "[Love from|Yours,] {name}.", "{name}.")
BODIES = {  # in a message the label is told by the whole of it: the classes share their words
    "invitation": (
        "[Come|Please come] to the {place} [tomorrow|this evening|today]. You can {use} my {thing}[ and eat {food}|].",
        "There is a race {where} [tomorrow|today]! [Who wins it will get|The prize is] {a_thing}. Everybody can come.",
        "Tell nobody, it is a [secret|surprise]. {name3} will get {a_thing} from us. Come to the {place}[ quickly|].",
        "You found my {thing}, so I [want to thank you|must thank you]. [Will you|Do you want to] eat {food} {where}?",
        "Do you want to {use} {a_thing}? [We meet|You will find us] {where} [today|at night]. You need no coin.",
    ),
    "lost": (
        "I [have lost|cannot find] my {thing}. [Who finds|If you find] {them} {where}, [come|please come] to me.",
        "I won {a_thing}, but now {it} {is} [lost|gone]. Please [look|help me look] {where}[ today|]. I pay a coin.",
        "I found {a_thing} {where} [today|this evening]. Did you lose {them}? [Come quickly|You need not pay].",
        "[Who|Tell me, who] has seen my {thing}? [I was|We were] {where} [today|at night]. I thank you with {food}.",
        "My {thing} fell [down|out of my bag] {where}. [Bring|Please bring] {them} to {name3}, and you get {food}.",
    ),
    "thanks": (
        "[Thank you|I must thank you] for the {thing}. I {use} {them} {where} [every day|at night].",
        "You found my [lost |]{thing} {where}. You came [at once|quickly][ and wanted no coin|]. You are so kind.",
        "I was [lost|sad|tired] {where}, and you gave me {a_thing}. [You are a true friend|I will tell everybody].",
        "[It was good|How kind it was] of you to come to the {place}! I won the race and got {a_thing} as a prize.",
        "You looked for my {thing} {where} [today|at night]. [I want to pay you with|Please take] {food}.",
    ),
    "trick": (
        "You [won|have won] {a_thing}! [Come|Come quickly] to the {place} [today|at night]. [Bring|First pay] a coin.",
        "I found your lost {thing}. [Put a coin {spot}|First pay a coin] {where}, and [tell nobody|I tell you more].",
        "[Today|Only today] you can get {a_thing} from me. [Put|Leave] {food} {where} at night[ and tell nobody|].",
        "It is a secret. [Who pays|If you pay] a coin {where} today, you will get {a_thing} [tomorrow|as a prize].",
        "{name3} wants to thank you with {a_thing}. Come to the {place} [at night|today]. [Bring|You need] a coin.",
    ),
}
LABELS = tuple(BODIES)
VERBS = (
    Verb("sees", "saw"), Verb("finds", "found"), Verb("holds", "held"), Verb("takes", "took"), Verb("wants", "wanted"),
    Verb("carries", "carried"), Verb("hides", "hid"), Verb("looks for", "looked for"), Verb("gets", "got"),
)
# fmt: on
LONE_THINGS = tuple(thing for thing in THINGS if not thing.plural)
SIGNS = {}  # for each feeling: how it shows, as a sentence about somebody by name
for _feeling in FEELINGS:
    if _signs := [sign.replace("{He}", "{name}") for sign in _feeling.signs if sign.startswith("{He}")]:
        SIGNS[_feeling.name] = _signs


@cache
def _split_of(fact: tuple[str, ...]) -> str:
    digest = hashlib.sha256("|".join(fact).encode()).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") % len(SPLITS)]


def _draw_facts(rng: random.Random, split: str, count: int, *columns: Sequence) -> list[tuple]:
    """Return facts of the split, nothing twice in them; each has one of every column, a word or a row of the world."""
    facts, names = [], []
    while len(facts) < count:
        fact = tuple(pick(rng, column) for column in columns)
        new = tuple(getattr(item, "name", item) for item in fact)
        if _split_of(new) == split and len({*names, *new}) == len(names) + len(new):
            facts.append(fact)
            names += new
    return facts


def _vary(rng: random.Random, text: str) -> str:
    """Return the text with one choice made of each `[a|b]`."""
    return re.sub(r"\[(.*?)\]", lambda choices: pick(rng, choices[1].split("|")), text)


def _list(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


def _write_message(rng: random.Random, split: str) -> dict[str, str]:
    label = pick(rng, LABELS)
    ((thing, colour, place),) = _draw_facts(rng, split, 1, THINGS, COLOURS, PLACES)
    sender, reader = pick_two(rng, CHILDREN)
    words = {"place": place.name, "where": place.where, "spot": pick(rng, place.spots)}
    words |= person_words(sender, "") | person_words(reader, "2") | person_words(pick(rng, GROWN_UPS), "3")
    words |= thing_words(thing, colour) | {"food": pick(rng, FOODS).some}
    text = " ".join(_vary(rng, pick(rng, texts)) for texts in (GREETINGS, BODIES[label], GOODBYES))
    return {"text": text.format_map(words), "label": label}


def _colour(rng: random.Random, split: str) -> Task:
    facts = _draw_facts(rng, split, 2, LONE_THINGS, COLOURS)
    sentences = [f"The {thing.name} is {colour}." for thing, colour in facts]
    thing, colour = pick(rng, facts)
    question = pick(rng, (f"What colour is the {thing.name}?", f"Tell me the colour of the {thing.name}."))
    return Task(question, " ".join(sentences), f"The {thing.name} is {colour}.")


def _two(rng: random.Random, split: str) -> Task:
    ((thing, colour),) = _draw_facts(rng, split, 1, LONE_THINGS, COLOURS)
    question = pick(rng, ("Make it two.", "Say it for two."))
    return Task(question, f"Here is {with_article(colour)} {thing.name}.", f"Here are two {colour} {thing.name}s.")


def _feeling(rng: random.Random, split: str) -> Task:
    ((child, feeling),) = _draw_facts(rng, split, 1, CHILDREN, tuple(SIGNS))
    story = pick(rng, SIGNS[feeling]).format_map(person_words(child, ""))
    question = pick(rng, (f"How does {child.name} feel?", f"Tell me how {child.name} feels."))
    return Task(question, story, f"{child.pronoun.capitalize()} is {feeling}.")


def _food(rng: random.Random, split: str) -> Task:
    ((first, second),) = _draw_facts(rng, split, 1, ANIMALS, ANIMALS)
    question = pick(rng, ("What do the {} and the {} eat?", "What do you give the {} and the {}?"))
    meal = f"{first.food} and {second.food}."
    return Task(question.format(first.name, second.name), "", meal[0].upper() + meal[1:])


def _source(rng: random.Random, split: str) -> Task:
    sources = ()
    while len(set(sources)) < 3:
        (names,) = _draw_facts(rng, split, 1, *[tuple(INGREDIENTS)] * 3)
        sources = [f"the {INGREDIENTS[name]}" for name in names]
    question = pick(rng, (f"Where do you get {_list(names)}?", f"I need {_list(names)}. Where do I go?"))
    return Task(question, "", f"To {_list(sources)}.")


def _helper(rng: random.Random, split: str) -> Task:
    (helpers,) = _draw_facts(rng, split, 1, *[GROWN_UPS] * 3)
    kinds = _list([f"the {helper.kind}" for helper in helpers])
    question = pick(rng, (f"Who are {kinds}?", f"Tell me the names of {kinds}."))
    return Task(question, "", f"{_list([helper.name for helper in helpers])}.")


def _reverse(rng: random.Random, split: str) -> Task:
    (colours,) = _draw_facts(rng, split, 1, *[COLOURS] * 3)
    question = pick(rng, ("Say the colours in reverse order.", "Say the colours from the last to the first."))
    return Task(question, f"I like {_list(colours)}.", f"I like {_list(colours[::-1])}.")


def _past(rng: random.Random, split: str) -> Task:
    ((child, verb, thing),) = _draw_facts(rng, split, 1, CHILDREN, VERBS, THINGS)
    a_thing = thing_words(thing, pick(rng, COLOURS))["a_thing"]
    question = pick(rng, ("Say it in the past.", "Tell it as if it happened yesterday."))
    return Task(question, f"{child.name} {verb.name} {a_thing}.", f"{child.name} {verb.past} {a_thing}.")


def _pronoun(rng: random.Random, split: str) -> Task:
    ((child, verb, thing),) = _draw_facts(rng, split, 1, CHILDREN, VERBS, THINGS)
    a_thing = thing_words(thing, pick(rng, COLOURS))["a_thing"]
    question = pick(rng, ("Say it with he or she.", "Write he or she for the name."))
    he = child.pronoun.capitalize()
    return Task(question, f"{child.name} {verb.name} {a_thing}.", f"{he} {verb.name} {a_thing}.")


INSTRUCTION_KINDS: tuple[Callable[[random.Random, str], Task], ...] = (
    _colour, _two, _feeling, _food, _source, _helper, _reverse, _past, _pronoun,
)  # fmt: skip


def _write_instruction(rng: random.Random, split: str) -> dict[str, str]:
    return pick(rng, INSTRUCTION_KINDS)(rng, split)._asdict()


def _generate(write: Callable, number: int, name: str, seed: int, split: str) -> Iterator[dict[str, str]]:
    if number < 0:
        raise ValueError(f"{name} is {number}; it must be 0 or more")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(dict.fromkeys(SPLITS))}")
    return (write(random.Random(f"{seed}:{split}:{i}"), split) for i in range(number))


def generate_messages(num_messages: int, seed: int = 0, split: str = "train") -> Iterator[dict[str, str]]:
    """Generate short notes of the villagers, each with its label, one of `LABELS`.

    Row `i` depends on `seed`, `split` and `i` alone: fewer rows are a prefix of more, on every platform. The thing,
    the colour and the place of a message are never together in a message of another split, whatever the seed.

    Args:
        num_messages: how many messages.
        seed: another seed gives other messages of the same kinds.
        split: `train`, `validation` or `test`.

    Returns:
        An iterator over rows of `text` and `label`, made while it is read; about 120 bytes a text.

    Raises:
        ValueError: `num_messages` is negative, or there is no such split.

    Example:
        >>> spam = [row["text"] for row in generate_messages(100) if row["label"] == "trick"]
    """
    return _generate(_write_message, num_messages, "num_messages", seed, split)


def generate_instructions(num_instructions: int, seed: int = 0, split: str = "train") -> Iterator[dict[str, str]]:
    """Generate instructions about the village with their only right answer, of eight words at most.

    Row `i` depends on `seed`, `split` and `i` alone: fewer rows are a prefix of more, on every platform. No fact of
    a row is found in a row of another split, whatever the seed.

    Args:
        num_instructions: how many rows.
        seed: another seed gives other rows of the same kinds.
        split: `train`, `validation` or `test`.

    Returns:
        An iterator over rows of `instruction`, `input` (which may be empty) and `output`, made while it is read.

    Raises:
        ValueError: `num_instructions` is negative, or there is no such split.

    Example:
        >>> next(generate_instructions(1))["instruction"].endswith(("?", "."))
        True
    """
    return _generate(_write_instruction, num_instructions, "num_instructions", seed, split)
