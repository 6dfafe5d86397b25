"""The village: its people, animals, places and things, and their grammatical forms."""

import random
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")
PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}  # subject, object, possessive


class Person(NamedTuple):
    name: str
    kind: str
    pronoun: str


class Animal(NamedTuple):
    name: str
    cried: str
    food: str
    place: str
    trouble: str
    tool: str
    rescue: str


class Place(NamedTuple):
    name: str
    where: str
    spots: tuple[str, str, str]


class Thing(NamedTuple):
    name: str
    use: str
    damage: str
    plural: bool = False


class Food(NamedTuple):
    name: str
    some: str
    split: str
    made_of: tuple[str, ...] = ()
    plural: bool = False


class Weather(NamedTuple):
    name: str
    cause: str
    sky: str
    prepare: str
    slip: str
    evening: str


ROWS = {
    "grown_ups": Person,
    "animals": Animal,
    "places": Place,
    "things": Thing,
    "foods": Food,
    "weathers": Weather,
}


class World(NamedTuple):
    """The tables of world.toml."""

    children: tuple[Person, ...]
    grown_ups: tuple[Person, ...]
    animals: tuple[Animal, ...]
    places: tuple[Place, ...]
    things: tuple[Thing, ...]
    foods: tuple[Food, ...]
    weathers: tuple[Weather, ...]
    colours: list[str]
    plants: list[str]
    damages: dict[str, dict[str, str]]
    ingredients: dict[str, str]
    feelings: dict[str, list[str]]


@cache
def read_tables(name: str) -> dict[str, Any]:
    """The content of a TOML file of this package."""
    return tomllib.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


@cache
def load_world() -> World:
    tables = dict(read_tables("world.toml"))
    children = [Person(name, "girl", "she") for name in tables.pop("girls")]
    children += [Person(name, "boy", "he") for name in tables.pop("boys")]
    for name, kind in ROWS.items():
        tables[name] = tuple(_read_row(kind, row, fields) for row, fields in tables[name].items())
    return World(tuple(children), **tables)


def _read_row(kind: type[NamedTuple], name: str, fields: dict[str, Any]) -> NamedTuple:
    # Lists become tuples, so that rows are hashable for caches.
    return kind(name, **{field: tuple(value) if isinstance(value, list) else value for field, value in fields.items()})


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def pick_two(rng: random.Random, items: Sequence[Item]) -> tuple[Item, Item]:
    first = int(rng.random() * len(items))
    second = (first + 1 + int(rng.random() * (len(items) - 1))) % len(items)
    return items[first], items[second]


def with_article(noun: str) -> str:
    """Return the noun with `a` or `an`; correct for the words of this world, which has no "hour" or "unicorn"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@cache
def person_words(person: Person, key: str = "") -> dict[str, str]:
    """Return the words for a person, with `key` appended to each name: `{he2}` is the second one's "he" or "she"."""
    he, him, his = PRONOUNS[person.pronoun]
    words = {"name": person.name, "kind": person.kind, "he": he, "him": him, "his": his}
    words |= {"He": he.capitalize(), "His": his.capitalize()}
    return {word + key: value for word, value in words.items()}


@cache
def thing_words(thing: Thing, colour: str) -> dict[str, str]:
    it, them, is_, was = ("they", "them", "are", "were") if thing.plural else ("it", "it", "is", "was")
    name = f"{colour} {thing.name}"
    words = {"thing": name, "a_thing": f"a pair of {name}" if thing.plural else with_article(name), "use": thing.use}
    words |= {"it": it, "It": it.capitalize(), "them": them, "is": is_, "was": was}
    return words | load_world().damages[thing.damage]
