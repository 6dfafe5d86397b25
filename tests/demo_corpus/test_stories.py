"""The embedded corpus: stories are deterministic, superficially correct English, and use every entry of the world."""

import hashlib
import random
import re
from itertools import islice

import pytest

from hfgpt.demo_corpus import generate_stories
from hfgpt.demo_corpus.world import load_world, read_tables

WORLD = load_world()
PLOTS = read_tables("plots.toml")["plots"]
DIALOGUE_TAGS = {"asked", "called", "cried", "he", "said", "she", "shouted"}
SPEECH_GOES_ON = {'"and wait."', '"but please be careful."', '"so now I share with you."'}


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return list(generate_stories(2000))


def find(pattern: str, stories: list[str]) -> list[str]:
    return [match[0] for story in stories for match in re.finditer(pattern, story)]


def test_fewer_stories_are_a_prefix_of_more():
    assert list(generate_stories(10, seed=3)) == list(generate_stories(20, seed=3))[:10]
    assert list(islice(generate_stories(10**9, seed=3), 10)) == list(generate_stories(10, seed=3))


def test_stories_are_the_same_on_every_platform():
    # The measured results of the recipes are for exactly these stories; after a change to the corpus, measure again.
    text = "\n".join(generate_stories(500, seed=3))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "872ca07c8f8f3093"


def test_global_random_state_is_neither_read_nor_changed():
    random.seed(1)
    state = random.getstate()
    first = list(generate_stories(20))
    assert random.getstate() == state
    random.seed(2)
    assert list(generate_stories(20)) == first


def test_seeds_differ():
    assert not set(generate_stories(200, seed=1)) & set(generate_stories(200, seed=2))


def test_number_of_stories():
    assert list(generate_stories(0)) == []
    assert len(list(generate_stories(7))) == 7
    with pytest.raises(ValueError, match="num_stories is -1"):
        generate_stories(-1)


def test_hardly_any_story_is_repeated():
    assert len(set(generate_stories(5000))) > 0.999 * 5000


def test_length_and_vocabulary_are_bounded(stories):
    lengths = [len(story.split()) for story in stories]
    assert min(lengths) >= 60
    assert max(lengths) <= 180
    words = {word.lower() for story in stories for word in re.findall(r"[A-Za-z']+", story)}
    # 611 when this was written; a second seed must not add new words.
    assert 500 <= len(words) <= 700
    assert {
        word.lower() for story in generate_stories(500, seed=9) for word in re.findall(r"[A-Za-z']+", story)
    } <= words


def test_story_is_one_ascii_paragraph_of_plain_characters(stories):
    assert find(r"[^A-Za-z ,.!?\"]", stories) == []
    assert find(r"  |^ | $| [,.!?]|[,.!?]{2}", stories) == []


def test_every_story_ends_a_sentence(stories):
    assert [story for story in stories if story[-1] not in ".!?"] == []
    assert [story for story in stories if not story[0].isupper()] == []


def test_quotation_marks_are_balanced(stories):
    for story in stories:
        quotes = re.findall(r'"[^"]*"', story)
        assert story.count('"') == 2 * len(quotes)
        # quoted speech starts with a capital letter (unless it continues) and ends with punctuation
        assert all(quote[1].isupper() or quote in SPEECH_GOES_ON for quote in quotes)
        assert all(quote[-2] in ",.!?" for quote in quotes)


def test_no_sentence_starts_lower_case(stories):
    assert find(r'(?<![a-z]")[.!?] [a-z]', stories) == []
    assert find(r'\." [a-z]', stories) == []
    assert {word[3:] for word in find(r'[!?]" [a-z]+', stories)} <= DIALOGUE_TAGS


def test_a_and_an_are_correct(stories):
    assert find(r"\b[Aa] [aeiouAEIOU]\w*", stories) == []
    assert find(r"\b[Aa]n [^aeiouAEIOU]\w*", stories) == []


def test_verbs_and_pronouns_agree_with_things(stories):
    plural = "|".join(thing.name for thing in WORLD.things if thing.plural)
    singular = "|".join(thing.name for thing in WORLD.things if not thing.plural)
    assert (
        find(rf"Where was the \w+ ({plural})\b|Where were the \w+ ({singular})\b|\bthe \w+ ({plural}) was", stories)
        == []
    )
    assert find(rf"\bthe \w+ ({singular}) were|\ban? \w+ ({plural})\b", stories) == []
    assert find(r"\b(it|he|she) were\b|\b(they|They) was\b|\b(it|he|she) are\b|\bthey is\b", stories) == []
    # no sentence has the same name as subject and object
    assert find(r"\b([A-Z]\w+) (?:hugged|gave|met|saw|told) \1\b", stories) == []


def test_two_children_of_a_story_differ(stories):
    names = {person.name for person in WORLD.children}
    for story in stories:
        assert len(set(re.findall(r"[A-Z]\w+", story)) & names) in (1, 2)


def test_weather_of_a_story_is_possible(stories):
    forbidden = {"cook": "make .* for (him|her)", "seed": "saw a green leaf"}
    for plot, pattern in forbidden.items():
        told = [story for story in stories if re.search(pattern, story)]
        assert told, plot
        assert not [story for story in told if "snow" in story]


def test_every_entry_of_the_world_is_used(stories):
    text = "\n".join(stories)
    rows = [*WORLD.children, *WORLD.animals, *WORLD.places, *WORLD.things, *WORLD.foods, *WORLD.weathers]
    needed = [row.name for row in rows] + [*WORLD.feelings, *WORLD.colours, *WORLD.plants, *WORLD.ingredients]
    needed += [f"{person.name}, the {person.kind}," for person in WORLD.grown_ups]
    needed += [spot for place in WORLD.places for spot in place.spots]
    needed += [place.where for place in WORLD.places if place.name not in PLOTS["guide"]["never_in"]]
    needed += [text for animal in WORLD.animals for text in (animal.cried, animal.food, animal.trouble, animal.tool)]
    needed += [
        text for weather in WORLD.weathers for text in (weather.cause, weather.sky, weather.slip, weather.evening)
    ]
    assert len(needed) > 200
    assert [entry for entry in needed if not re.search(rf"\b{re.escape(entry)}(?!\w)", text)] == []


def test_tables_refer_to_each_other():
    place_names = {place.name for place in WORLD.places}
    assert {animal.place for animal in WORLD.animals} | set(WORLD.ingredients.values()) <= place_names
    assert {thing.damage for thing in WORLD.things} == set(WORLD.damages)
    assert {made_of for food in WORLD.foods for made_of in food.made_of} == set(WORLD.ingredients)
    # a dish needs two ingredients from two places, since its story goes from one to the other
    assert all(len({WORLD.ingredients[name] for name in dish.made_of}) == 2 for dish in WORLD.foods if dish.made_of)
    rows = {row.name for row in (*WORLD.weathers, *WORLD.places)}
    assert {name for plot in PLOTS.values() for name in plot.get("never_in", ())} <= rows
