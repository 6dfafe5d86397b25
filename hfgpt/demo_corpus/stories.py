"""Short stories about the village, generated from the plots in plots.toml."""

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from hfgpt.demo_corpus.world import (
    Food,
    Place,
    Weather,
    load_world,
    person_words,
    pick,
    pick_two,
    read_tables,
    thing_words,
    with_article,
)


class Plot(NamedTuple):
    beats: list[list[tuple]]  # lines per beat, choices per part of a line; fixed text is a single choice
    weathers: list[Weather]
    places: list[Place]


def generate_stories(num_stories: int, seed: int = 0) -> Iterator[str]:
    """Generate short stories about the village, each a paragraph of about 150 words without line breaks.

    Story `i` depends only on `seed` and `i`: fewer stories are a prefix of more, on every platform.

    Args:
        num_stories: Number of stories.
        seed: Random seed; different seeds give different stories about the same world.

    Returns:
        A lazy iterator over the stories; about 770 bytes per story.

    Raises:
        ValueError: `num_stories` is negative.

    Example:
        >>> text = "\\n\\n".join(generate_stories(2000, seed=1))
    """
    if num_stories < 0:
        raise ValueError(f"num_stories is {num_stories}; it must be 0 or more")
    return (_tell_story(random.Random(f"{seed}:{i}")) for i in range(num_stories))


def _tell_story(rng: random.Random) -> str:
    plot = pick(rng, load_plots())
    cast = _choose_cast(rng, plot)
    lines = ("".join(pick(rng, choices) for choices in pick(rng, beat)) for beat in plot.beats)
    # Twice, because words of the cast contain placeholders for its pronouns.
    return " ".join(lines).format_map(cast).format_map(cast)


@cache
def load_plots() -> list[Plot]:
    world, tables = load_world(), read_tables("plots.toml")
    shared = dict(tables["shared"])
    with_sign, without_sign = tables["feelings"]["with_sign"], tables["feelings"]["without_sign"]
    for feeling, signs in world.feelings.items():
        lines = [with_sign.format(feeling=feeling, sign=sign) for sign in signs]
        shared[feeling] = "\n/ ".join([*lines, without_sign.format(feeling=feeling)])
    plots = []
    for plot in tables["plots"].values():
        never_in = plot.get("never_in", ())
        rows = ([row for row in rows if row.name not in never_in] for rows in (world.weathers, world.places))
        plots.append(Plot(_parse_beats(plot["text"], shared), *rows))
    return plots


def _parse_beats(text: str, shared: dict[str, str]) -> list[list[tuple]]:
    text = re.sub(r"@(\S+) ?", lambda names: "\n/ ".join(shared[name] for name in names[1].split("|")) + "\n", text)
    beats = []
    for line in filter(None, text.splitlines()):
        if not line.startswith("/ "):
            beats.append([])
        parts = re.split(r"\[(.*?)\]", line.removeprefix("/ "))
        beats[-1].append(tuple(tuple(part.split("|")) if i % 2 else (part,) for i, part in enumerate(parts)))
    return beats


def _choose_cast(rng: random.Random, plot: Plot) -> dict[str, str]:
    """Return all words that a plot can use, drawn from the world for one story."""
    world = load_world()
    child, friend = pick_two(rng, world.children)
    place, home = pick_two(rng, plot.places)
    spot1, spot2 = pick_two(rng, place.spots)
    food, food2 = pick_two(rng, world.foods)
    dish, animal, weather = pick(rng, _list_dishes()), pick(rng, world.animals), pick(rng, plot.weathers)
    an_animal = with_article(animal.name)
    words = animal._asdict() | weather._asdict() | {"weather": weather.name, "plant": pick(rng, world.plants)}
    words |= {"animal": animal.name, "animal_food": animal.food, "animal_place": animal.place}
    words |= {"an_animal": an_animal, "An_animal": an_animal.capitalize()}
    words |= {"place": place.name, "where": place.where, "spot1": spot1, "spot2": spot2, "home": home.name}
    words |= person_words(child) | person_words(friend, "2") | person_words(pick(rng, world.grown_ups), "3")
    words |= _food_words(food, "food") | _food_words(food2, "food2") | _dish_words(dish)
    return words | thing_words(pick(rng, world.things), pick(rng, world.colours))


@cache
def _list_dishes() -> list[Food]:
    return [food for food in load_world().foods if food.made_of]


@cache
def _food_words(food: Food, key: str) -> dict[str, str]:
    it, them, was, this_is = ("they", "them", "were", "These are") if food.plural else ("it", "it", "was", "This is")
    words = {"it": it, "them": them, "was": was, "this_is": this_is, "split": food.split}
    return {key: food.name, f"some_{key}": food.some, **{f"{key}_{word}": value for word, value in words.items()}}


@cache
def _dish_words(dish: Food) -> dict[str, str]:
    (ing1, ing2), sources = dish.made_of, load_world().ingredients
    words = {"ing1": ing1, "ing2": ing2, "source1": sources[ing1], "source2": sources[ing2]}
    return words | _food_words(dish, "dish")
