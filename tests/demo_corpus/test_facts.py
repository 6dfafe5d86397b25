"""Messages and instructions: deterministic, correct according to the tables, and no facts shared between splits."""

import hashlib
import json
import random
import re
from collections import Counter
from itertools import islice

import pytest

from hfgpt.demo_corpus import generate_instructions, generate_messages
from hfgpt.demo_corpus.world import PRONOUNS, load_world, read_tables

WORLD = load_world()
GENERATORS = (generate_messages, generate_instructions)
SPLITS = ("train", "validation", "test")
CHILD = {person.name: person for person in WORLD.children}
ANIMAL = {animal.name: animal for animal in WORLD.animals}
HELPER = {person.kind: person.name for person in WORLD.grown_ups}
MESSAGE = {
    "text": "Mia, I must tell you something. It is a secret. Who pays a coin on the hill today, you will get a black "
    "basket as a prize. Leo, near the hill.",
    "label": "trick",
}
INSTRUCTION = {
    "instruction": "Say the colours from the last to the first.",
    "input": "I like blue, yellow and brown.",
    "output": "I like brown, yellow and blue.",
}
DIGESTS = {
    generate_messages: ("f0afd8eff0885988", "90cbe5f6b2716691", "dcc1d40df5f19071"),
    generate_instructions: ("e7976ec01db53d21", "92a37dcfa352ec4c", "49af9f185cfb18a1"),
}
PAST = read_tables("instructions.toml")["verbs"]
LABELS = tuple(read_tables("messages.toml")["bodies"])


def rows_of(generate, split: str, count: int, seeds=(0,)) -> list[dict[str, str]]:
    return [row for seed in seeds for row in generate(count, seed=seed, split=split)]


def words_of(row: dict[str, str]) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", " ".join(row.values())))


@pytest.fixture(scope="module")
def messages() -> dict[str, list[dict[str, str]]]:
    return {split: rows_of(generate_messages, split, 2000, seeds=(0, 1)) for split in SPLITS}


@pytest.fixture(scope="module")
def instructions() -> dict[str, list[dict[str, str]]]:
    return {split: rows_of(generate_instructions, split, 4000, seeds=(0, 1)) for split in SPLITS}


@pytest.mark.parametrize("generate", GENERATORS)
@pytest.mark.parametrize("split", SPLITS)
def test_fewer_rows_are_a_prefix_of_more(generate, split):
    assert list(generate(10, seed=3, split=split)) == list(generate(20, seed=3, split=split))[:10]
    assert list(islice(generate(10**9, 3, split), 10)) == list(generate(10, 3, split))
    assert list(generate(10, seed=3, split=split)) != list(generate(10, seed=4, split=split))


@pytest.mark.parametrize("generate", GENERATORS)
def test_global_random_state_is_neither_read_nor_changed(generate):
    random.seed(1)
    state = random.getstate()
    first = list(generate(20))
    assert random.getstate() == state
    random.seed(2)
    assert list(generate(20)) == first


def test_rows_are_the_same_on_every_platform():
    assert next(generate_messages(1, seed=5)) == MESSAGE
    assert next(generate_instructions(1, seed=5, split="test")) == INSTRUCTION
    for generate, digests in DIGESTS.items():
        for split, digest in zip(SPLITS, digests, strict=True):
            text = "\n".join(map(json.dumps, generate(500, seed=3, split=split)))
            assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("generate", GENERATORS)
def test_bad_arguments_are_refused(generate):
    assert list(generate(0)) == []
    with pytest.raises(ValueError, match=r"num_\w+ is -1; it must be 0 or more"):
        generate(-1)
    with pytest.raises(ValueError, match="split is 'dev'; it must be one of train, validation, test"):
        generate(1, split="dev")


def test_no_message_is_in_two_splits(messages):
    texts = {split: {row["text"] for row in rows} for split, rows in messages.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def message_fact(text: str) -> tuple[str, ...]:
    colours, names = "|".join(WORLD.colours), "|".join(thing.name for thing in WORLD.things)
    places = "|".join(
        rf"{re.escape(place.where)}\b|[Cc]ome (?:quickly )?to the {place.name}\b" for place in WORLD.places
    )
    (thing,) = set(re.findall(rf"\b(?:{colours}) (?:{names})\b", text))
    found = {match.split()[-1] for match in re.findall(places, text)}
    assert len(found) == 1, text
    return thing, *found


def test_each_pair_of_thing_and_place_is_in_one_split_only(messages):
    facts = {split: {message_fact(row["text"]) for row in rows} for split, rows in messages.items()}
    assert not facts["train"] & facts["test"]
    assert not facts["train"] & facts["validation"]
    assert not facts["validation"] & facts["test"]


def test_no_question_is_in_two_splits(instructions):
    asked = {split: {(row["instruction"], row["input"]) for row in rows} for split, rows in instructions.items()}
    assert not asked["train"] & asked["test"]
    assert not asked["train"] & asked["validation"]
    assert not asked["validation"] & asked["test"]


def test_no_fact_of_a_colour_is_in_two_splits(instructions):
    pattern = r"The (\w+) is (\w+)\."
    facts = {
        split: {fact for row in rows for fact in re.findall(pattern, row["input"])}
        for split, rows in instructions.items()
    }
    assert len(facts["test"]) >= 10
    assert not facts["train"] & facts["test"]
    assert not facts["train"] & facts["validation"]


@pytest.mark.parametrize("name", ["messages", "instructions"])
def test_every_word_of_the_other_splits_is_in_the_training_split(name, request):
    rows = request.getfixturevalue(name)
    known = set().union(*map(words_of, rows["train"]))
    for split in ("validation", "test"):
        assert set().union(*map(words_of, rows[split])) <= known


def test_labels_are_balanced(messages):
    for rows in messages.values():
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(LABELS)
        assert min(counts.values()) > 0.2 * len(rows)


def test_no_single_word_decides_a_label(messages):
    rows = [(row["label"], set(re.findall(r"[a-z]+", row["text"].lower()))) for row in messages["train"]]
    told = Counter((label, word) for label, words in rows for word in words)
    used = Counter(word for _, words in rows for word in words)
    size = Counter(label for label, _ in rows)
    # F1 of the rule "a message with this word has this label"
    scores = {(label, word): 2 * hits / (used[word] + size[label]) for (label, word), hits in told.items()}
    assert max(scores.values()) < 0.8
    # and the subject of a trick occurs in all other kinds, too
    for word in ("coin", "found", "come", "at", "get", "today", "quickly", "thank"):
        assert sum((label, word) in told for label in LABELS) >= 3, word


def test_no_message_has_two_labels(messages):
    label_of = {}
    for rows in messages.values():
        for row in rows:
            assert label_of.setdefault(row["text"], row["label"]) == row["label"]


def test_no_question_has_two_answers(instructions):
    answer_of = {}
    for rows in instructions.values():
        for row in rows:
            assert answer_of.setdefault((row["instruction"], row["input"]), row["output"]) == row["output"]


def test_texts_are_plain_sentences(messages, instructions):
    texts = [row["text"] for rows in messages.values() for row in rows]
    texts += [text for rows in instructions.values() for row in rows for text in row.values() if text]
    for text in texts:
        assert re.fullmatch(r"[A-Z][A-Za-z ,.!?]*[.!?]", text), text
        assert not re.search(r"  | [,.!?]|[,.!?]{2}|[.!?] [a-z]", text), text
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", text), text


def test_verbs_agree_with_things(messages):
    plural = "|".join(thing.name for thing in WORLD.things if thing.plural)
    for row in messages["train"]:
        assert not re.search(rf"\ban? \w+ ({plural})\b|\b(it|he|she) are\b|\bthey is\b", row["text"]), row["text"]


def listed(text: str) -> list[str]:
    return re.split(r", | and ", text)


def answer(instruction: str, text: str) -> tuple[str, str]:
    """The kind of an instruction and its answer, derived from the tables and the input alone."""
    if match := re.fullmatch(r"(?:What colour is|Tell me the colour of) the (\w+)[?.]", instruction):
        colours = dict(re.findall(r"The (\w+) is (\w+)\.", text))
        assert len(colours) == len(set(colours.values())) == 2
        return "colour", f"The {match[1]} is {colours[match[1]]}."
    if instruction in ("Make it two.", "Say it for two."):
        colour, thing = re.fullmatch(r"Here is an? (\w+) (\w+)\.", text).groups()
        return "two", f"Here are two {colour} {thing}s."
    if match := re.fullmatch(r"How does (\w+) feel\?|Tell me how (\w+) feels\.", instruction):
        child = CHILD[match[1] or match[2]]
        he, _, his = PRONOUNS[child.pronoun]
        sign = text.replace(child.name, "{He}").replace(f" {his} ", " {his} ")  # restore the wording of the table
        (feeling,) = (name for name, signs in WORLD.feelings.items() if sign in signs)
        return "feeling", f"{he.capitalize()} is {feeling}."
    if match := re.fullmatch(r"What do (?:the (.*) eat|you give the (.*))\?", instruction):
        first, second = (match[1] or match[2]).split(" and the ")
        return "food", f"{ANIMAL[first].food} and {ANIMAL[second].food}.".capitalize()
    if match := re.fullmatch(r"Where do you get (.*)\?|I need (.*)\. Where do I go\?", instruction):
        places = [f"the {WORLD.ingredients[name]}" for name in listed(match[1] or match[2])]
        assert len(set(places)) == 3
        return "source", f"To {places[0]}, {places[1]} and {places[2]}."
    if match := re.fullmatch(r"Who are (.*)\?|Tell me the names of (.*)\.", instruction):
        names = [HELPER[kind.removeprefix("the ")] for kind in listed(match[1] or match[2])]
        return "helper", f"{names[0]}, {names[1]} and {names[2]}."
    if "colour" in instruction and (match := re.fullmatch(r"I like (\w+), (\w+) and (\w+)\.", text)):
        assert set(match.groups()) <= set(WORLD.colours)
        return "reverse", f"I like {match[3]}, {match[2]} and {match[1]}."
    name, verb, rest = re.fullmatch(rf"(\w+) ({'|'.join(PAST)}) (an? .*\.)", text).groups()
    if instruction in ("Say it in the past.", "Tell it as if it happened yesterday."):
        return "past", f"{name} {PAST[verb]} {rest}"
    assert instruction in ("Say it with he or she.", "Write he or she for the name.")
    return "pronoun", f"{CHILD[name].pronoun.capitalize()} {verb} {rest}"


def test_answers_are_correct_according_to_the_tables(instructions):
    for rows in instructions.values():
        kinds = Counter()
        for row in rows:
            kind, expected = answer(row["instruction"], row["input"])
            assert row["output"] == expected
            kinds[kind] += 1
        assert len(kinds) == 9
        assert min(kinds.values()) > 0.08 * len(rows)
        assert max(len(row["output"].split()) for row in rows) <= 8
        assert {bool(row["input"]) for row in rows} == {True, False}


def test_every_instruction_has_the_same_wordings_in_all_splits(instructions):
    def wordings(rows):
        world = "|".join([*CHILD, *ANIMAL, *HELPER, *WORLD.ingredients, *(t.name for t in WORLD.things)])
        return {re.sub(rf"\b({world})\b", "X", row["instruction"]) for row in rows}

    assert wordings(instructions["train"]) == wordings(instructions["test"]) == wordings(instructions["validation"])
