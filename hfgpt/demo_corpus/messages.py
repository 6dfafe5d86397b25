"""Messages of the village: short notes with a label; the task is to tell what kind of note it is."""

import random
import re
from collections.abc import Iterator

from hfgpt.demo_corpus.facts import draw_facts, generate_rows
from hfgpt.demo_corpus.world import load_world, person_words, pick, pick_two, read_tables, thing_words


def generate_messages(num_messages: int, seed: int = 0, split: str = "train") -> Iterator[dict[str, str]]:
    """Generate short notes of the villagers, each with its label: `invitation`, `lost`, `thanks` or `trick`.

    Row `i` depends on `seed`, `split` and `i` alone: fewer rows are a prefix of more, on every platform. The thing,
    the colour and the place of a message are never together in a message of another split, whatever the seed.

    Args:
        num_messages: how many messages.
        seed: another seed gives other messages of the same kinds.
        split: `train`, `validation` or `test`.

    Returns:
        An iterator over rows of `text` and `label`, made while it is read; about 120 bytes a text.

    Raises:
        ValueError: `num_messages` is negative, or the split is unknown.

    Example:
        >>> spam = [row["text"] for row in generate_messages(100) if row["label"] == "trick"]
    """
    return generate_rows(_write_message, num_messages, "num_messages", seed, split)


def _write_message(rng: random.Random, split: str) -> dict[str, str]:
    world, texts = load_world(), read_tables("messages.toml")
    label = pick(rng, list(texts["bodies"]))
    ((thing, colour, place),) = draw_facts(rng, split, 1, world.things, world.colours, world.places)
    sender, reader = pick_two(rng, world.children)
    words = {"place": place.name, "where": place.where, "spot": pick(rng, place.spots)}
    words |= person_words(sender) | person_words(reader, "2") | person_words(pick(rng, world.grown_ups), "3")
    words |= thing_words(thing, colour) | {"food": pick(rng, world.foods).some}
    parts = (texts["greetings"], texts["bodies"][label], texts["goodbyes"])
    text = " ".join(_vary(rng, pick(rng, part)) for part in parts)
    return {"text": text.format_map(words), "label": label}


def _vary(rng: random.Random, text: str) -> str:
    """Return the text with one choice made of each `[a|b]`."""
    return re.sub(r"\[(.*?)\]", lambda choices: pick(rng, choices[1].split("|")), text)
