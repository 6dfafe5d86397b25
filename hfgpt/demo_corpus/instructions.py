"""Instructions about the village, whose answers follow from the input and from facts in the stories."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from hfgpt.demo_corpus.facts import draw_facts, generate_rows
from hfgpt.demo_corpus.world import Thing, load_world, person_words, pick, read_tables, thing_words, with_article


def generate_instructions(num_instructions: int, seed: int = 0, split: str = "train") -> Iterator[dict[str, str]]:
    """Generate instructions about the village, each with its only correct answer of at most eight words.

    Row `i` depends only on `seed`, `split` and `i`: fewer rows are a prefix of more, on every platform. No fact of a
    row occurs in a row of another split, for any seed.

    Args:
        num_instructions: Number of rows.
        seed: Random seed; different seeds give different rows of the same kinds.
        split: `train`, `validation` or `test`.

    Returns:
        A lazy iterator over rows of `instruction`, `input` (which may be empty) and `output`.

    Raises:
        ValueError: `num_instructions` is negative, or the split is unknown.

    Example:
        >>> next(generate_instructions(1))["instruction"].endswith(("?", "."))
        True
    """
    return generate_rows(_write_instruction, num_instructions, "num_instructions", seed, split)


def _write_instruction(rng: random.Random, split: str) -> dict[str, str]:
    kind, texts = pick(rng, _list_kinds())
    words = DRAW[kind](rng, split)
    return {
        "instruction": pick(rng, texts["instructions"]).format_map(words),
        "input": texts["input"].format_map(words),
        "output": texts["output"].format_map(words),
    }


@cache
def _list_kinds() -> list[tuple[str, dict]]:
    return list(read_tables("instructions.toml")["kinds"].items())


@cache
def _list_single_things() -> list[Thing]:
    return [thing for thing in load_world().things if not thing.plural]


@cache
def _list_signs() -> dict[str, list[str]]:
    """Return for each feeling the sentences that show it, with a placeholder for the child's name."""
    signs = {}
    for feeling, texts in load_world().feelings.items():
        if told := [text.replace("{He}", "{name}") for text in texts if text.startswith("{He}")]:
            signs[feeling] = told
    return signs


def _number(**columns: Sequence[str]) -> dict[str, str]:
    return {f"{name}{i}": word for name, words in columns.items() for i, word in enumerate(words, 1)}


def _draw_colour(rng: random.Random, split: str) -> dict[str, str]:
    facts = draw_facts(rng, split, 2, _list_single_things(), load_world().colours)
    thing, colour = pick(rng, facts)
    words = _number(thing=[thing.name for thing, _ in facts], colour=[colour for _, colour in facts])
    return words | {"thing": thing.name, "colour": colour}


def _draw_two(rng: random.Random, split: str) -> dict[str, str]:
    ((thing, colour),) = draw_facts(rng, split, 1, _list_single_things(), load_world().colours)
    return {"thing": thing.name, "colour": colour, "a_colour": with_article(colour)}


def _draw_feeling(rng: random.Random, split: str) -> dict[str, str]:
    signs = _list_signs()
    ((child, feeling),) = draw_facts(rng, split, 1, load_world().children, list(signs))
    words = person_words(child)
    return words | {"feeling": feeling, "sign": pick(rng, signs[feeling]).format_map(words)}


def _draw_food(rng: random.Random, split: str) -> dict[str, str]:
    (animals,) = draw_facts(rng, split, 1, *[load_world().animals] * 2)
    foods = [animal.food for animal in animals]
    return _number(animal=[animal.name for animal in animals], food=foods, Food=[food.capitalize() for food in foods])


def _draw_source(rng: random.Random, split: str) -> dict[str, str]:
    ingredients, places = load_world().ingredients, ()
    while len(set(places)) < 3:
        (names,) = draw_facts(rng, split, 1, *[list(ingredients)] * 3)
        places = [ingredients[name] for name in names]
    return _number(ingredient=names, place=places)


def _draw_helper(rng: random.Random, split: str) -> dict[str, str]:
    (helpers,) = draw_facts(rng, split, 1, *[load_world().grown_ups] * 3)
    return _number(kind=[helper.kind for helper in helpers], name=[helper.name for helper in helpers])


def _draw_reverse(rng: random.Random, split: str) -> dict[str, str]:
    (colours,) = draw_facts(rng, split, 1, *[load_world().colours] * 3)
    return _number(colour=colours)


def _draw_deed(rng: random.Random, split: str) -> dict[str, str]:
    world, verbs = load_world(), read_tables("instructions.toml")["verbs"]
    ((child, verb, thing),) = draw_facts(rng, split, 1, world.children, list(verbs), world.things)
    words = person_words(child) | thing_words(thing, pick(rng, world.colours))
    return words | {"verb": verb, "past": verbs[verb]}


DRAW: dict[str, Callable[[random.Random, str], dict[str, str]]] = {
    "colour": _draw_colour,
    "two": _draw_two,
    "feeling": _draw_feeling,
    "food": _draw_food,
    "source": _draw_source,
    "helper": _draw_helper,
    "reverse": _draw_reverse,
    "past": _draw_deed,
    "pronoun": _draw_deed,
}
