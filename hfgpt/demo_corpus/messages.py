"""Messages from the village: short notes with a label; the task is to classify the kind of note."""

import random
import re
from collections.abc import Iterator

from hfgpt.demo_corpus.facts import draw_facts, generate_rows
from hfgpt.demo_corpus.world import load_world, person_words, pick, pick_two, read_tables, thing_words


def generate_messages(num_messages: int, seed: int = 0, split: str = "train") -> Iterator[dict[str, str]]:
    """Generate short notes from the villagers, each with its label: `invitation`, `lost`, `thanks` or `trick`.

    Row `i` depends only on `seed`, `split` and `i`: fewer rows are a prefix of more, on every platform. The thing, the
    colour and the place of a message never occur together in a message of another split, for any seed.

    Args:
        num_messages: Number of messages.
        seed: Random seed; different seeds give different messages of the same kinds.
        split: `train`, `validation` or `test`.

    Returns:
        A lazy iterator over rows of `text` and `label`; about 120 bytes per text.

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
    """Return the text with one alternative of each `[a|b]`."""
    return re.sub(r"\[(.*?)\]", lambda choices: pick(rng, choices[1].split("|")), text)
