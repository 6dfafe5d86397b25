"""The embedded corpus: short stories of one little village, generated from a seed and never stored.

First the world (people, animals, places, things, ...) as plain tables, then the plots; all text is our own. A plot is
text of one beat a line: a line that starts with `/` is another way to tell the beat above it, `[a|b]` is a choice in a
line, `@a|b` is a beat of its own, told as `a` or `b` of `SHARED`, and `{word}` is filled from the cast of the story,
so that pronouns, verbs and articles agree. Randomness is `random.Random(f"{seed}:{i}")` and its `random()` alone,
because Python promises that sequence across versions and platforms.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


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
    tool: str  # what helps it out of its trouble, and how
    rescue: str


class Place(NamedTuple):
    name: str
    where: str
    spots: tuple[str, str, str]


class Thing(NamedTuple):
    name: str
    use: str
    damage: str  # a key of DAMAGES
    plural: bool = False  # comes as a pair


class Food(NamedTuple):
    name: str
    some: str
    split: str
    made_of: tuple[str, ...] = ()  # keys of INGREDIENTS; empty where nothing is cooked
    plural: bool = False


class Feeling(NamedTuple):
    name: str
    is_good: bool
    signs: tuple[str, ...]


class Weather(NamedTuple):
    name: str
    cause: str
    sky: str
    prepare: str
    slip: str
    evening: str


# fmt: off
PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}  # subject, object, possessive
GIRLS = ("Mia", "Anna", "Lily", "Nora", "Ella", "Rosa", "Ivy", "Clara", "Zoe", "Tilda")
BOYS = ("Ben", "Tom", "Leo", "Sam", "Max", "Finn", "Hugo", "Oscar", "Noah", "Jack")
CHILDREN = (*(Person(name, "girl", "she") for name in GIRLS), *(Person(name, "boy", "he") for name in BOYS))
GROWN_UPS = (
    Person("Mrs Bell", "baker", "she"), Person("Mr Reed", "miller", "he"), Person("Mrs Moss", "farmer", "she"),
    Person("Mr Finch", "teacher", "he"), Person("Mrs Thorn", "gardener", "she"), Person("Mr Flint", "smith", "he"),
    Person("Mrs Hall", "doctor", "she"), Person("Mr Marsh", "fisherman", "he"),
)
ANIMALS = (
    Animal("kitten", "meowed", "some milk", "orchard", "sat high in a tree", "a ladder", "carried the {animal} down"),
    Animal("puppy", "barked", "a bone", "hill", "sat at the bottom of a hole", "a rope", "pulled the {animal} up"),
    Animal("lamb", "bleated", "some grass", "meadow", "was caught in the fence", "a saw", "cut the {animal} free"),
    Animal("duckling", "quacked", "some seeds", "lake", "was caught in a net", "a knife", "cut the {animal} free"),
    Animal("rabbit", "squeaked", "a carrot", "garden", "was stuck under the gate", "a spade", "dug the {animal} out"),
    Animal("owl", "hooted", "some meat", "mill", "was locked in a dark shed", "a key", "let the {animal} out"),
    Animal("squirrel", "chattered", "a nut", "forest", "was stuck in a hollow log", "a saw", "cut the {animal} free"),
    Animal("goat", "bleated", "a turnip", "farm", "stood on the barn roof", "a ladder", "carried the {animal} down"),
    Animal("pony", "whinnied", "an apple", "river", "stood in deep mud", "a rope", "pulled the {animal} out"),
    Animal("mouse", "squeaked", "some cheese", "market", "was locked in an iron box", "a key", "let the {animal} out"),
    Animal("fox", "whined", "an egg", "forest", "sat at the bottom of a deep pit", "a rope", "pulled the {animal} up"),
    Animal("crow", "cawed", "some corn", "square", "was caught in a long string", "a knife", "cut the {animal} free"),
)
PLACES = (
    Place("forest", "in the forest", ("behind an old log", "under a low bush", "at the foot of a tall tree")),
    Place("river", "by the river", ("between two stones", "under the bridge", "behind a small boat")),
    Place("hill", "on the hill", ("behind a big rock", "under a thorn bush", "beside the stone wall")),
    Place("market", "at the market", ("behind a barrel", "under a long table", "beside an empty cart")),
    Place("meadow", "in the meadow", ("beside the gate", "under a round bush", "behind the fence")),
    Place("farm", "at the farm", ("behind the barn", "beside the hay", "under the old cart")),
    Place("lake", "by the lake", ("under a wooden boat", "beside the reeds", "behind a flat rock")),
    Place("mill", "near the mill", ("behind a sack of flour", "beside the mill wheel", "under the stone steps")),
    Place("orchard", "in the orchard", ("under a ladder", "at the foot of an apple tree", "behind a wooden box")),
    Place("garden", "in the garden", ("behind the shed", "under the bench", "beside the pump")),
    Place("square", "in the square", ("beside the well", "under a stone bench", "behind the clock tower")),
)
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange", "purple")
THINGS = (
    Thing("kite", "fly", "tear"), Thing("ball", "play with", "tear"), Thing("hat", "wear", "tear"),
    Thing("doll", "play with", "tear"), Thing("book", "read", "tear"), Thing("umbrella", "carry", "tear"),
    Thing("ribbon", "wear", "tear"), Thing("drum", "play", "crack"), Thing("flute", "play", "crack"),
    Thing("cup", "drink from", "crack"), Thing("boat", "play with", "crack"), Thing("lantern", "carry", "crack"),
    Thing("whistle", "blow", "crack"), Thing("top", "spin", "crack"), Thing("basket", "carry", "break"),
    Thing("mask", "wear", "crack"), Thing("puppets", "play with", "tear", plural=True),
    Thing("glasses", "wear", "crack", plural=True), Thing("drumsticks", "play with", "crack", plural=True),
)
DAMAGES = {  # what the thing did, what the person did, how it is mended
    "tear": ("tore", "tore", "sewed {them} with a needle and thread"),
    "crack": ("cracked", "cracked", "mended {them} with strong glue"),
    "break": ("came apart", "broke", "mended {them} with a hammer and nails"),
}
INGREDIENTS = {  # and where they are found
    "flour": "mill", "apples": "orchard", "carrots": "garden", "eggs": "farm", "milk": "farm", "honey": "market",
    "salt": "market", "berries": "forest",
}
FOODS = (
    Food("pie", "an apple pie", "cut the pie in two", ("apples", "flour")),
    Food("bread", "a loaf of bread", "broke the bread in two", ("flour", "salt")),
    Food("soup", "a pot of soup", "poured half of the soup into a bowl", ("carrots", "salt")),
    Food("cake", "a honey cake", "cut the cake in two", ("eggs", "honey")),
    Food("pancakes", "some pancakes", "made two piles of the pancakes", ("milk", "flour"), plural=True),
    Food("muffins", "some muffins", "made two piles of the muffins", ("eggs", "berries"), plural=True),
    Food("cheese", "a piece of cheese", "broke the cheese in two"),
    Food("sandwich", "an egg sandwich", "broke the sandwich in two"),
    Food("pear", "a big pear", "cut the pear in two"),
    Food("plums", "a basket of plums", "made two piles of the plums", plural=True),
    Food("nuts", "a bag of nuts", "made two piles of the nuts", plural=True),
)
FEELINGS = (
    Feeling("happy", True, ("{He} smiled from ear to ear.", "{He} wanted to sing and dance.")),
    Feeling("proud", True, ("{He} held {his} head high.", "{He} had done a good thing.")),
    Feeling("grateful", True, ("{He} did not know what to say.", "There were tears of joy in {his} eyes.")),
    Feeling("surprised", True, ("{He} opened {his} eyes wide.", "{He} could hardly speak.")),
    Feeling("sad", False, ("Tears ran down {his} cheeks.", "{He} sat down and cried.")),
    Feeling("afraid", False, ("{His} knees shook.", "{His} heart beat fast.")),
    Feeling("angry", False, ("{His} face turned red.", "{He} stamped {his} foot.")),
    Feeling("lonely", False, ("The days were long and quiet.", "There was nobody to talk to.")),
    Feeling("worried", False, ("{He} walked up and down.", "{He} could not sit still.")),
    Feeling("tired", False, ("{His} legs were heavy.", "{He} could hardly keep {his} eyes open.")),
)
WEATHERS = (
    Weather("sunny", "the bright sun", "the sky was blue and the birds sang", "left {his} coat at home",
            "looked up at the birds and fell over a stone", "the sun went down and the sky turned pink"),
    Weather("rainy", "the heavy rain", "the rain fell on the roofs", "put on {his} raincoat",
            "slipped on the wet path", "the rain stopped and the stars came out"),
    Weather("windy", "the strong wind", "the wind shook the trees", "put on {his} warm cap",
            "ran against the wind and fell", "the wind grew tired and the trees stood still"),
    Weather("snowy", "the soft snow", "white snow lay on the roofs", "put on {his} thick coat",
            "slipped on the ice", "the snow shone in the light of the moon"),
    Weather("foggy", "the thick fog", "a thick fog hid the houses", "took a small lamp",
            "fell over a stone in the fog", "the fog went away and the moon came out"),
    Weather("cloudy", "the dark clouds", "grey clouds hung over the village", "put on {his} old coat",
            "looked up at the clouds and fell over a root", "the clouds went away and the stars came out"),
)
PLANTS = ("sunflower", "pumpkin", "melon", "cabbage", "rose")
# fmt: on

SHARED = {
    "opening": """Once upon a time, there was a [little|kind|clever|cheerful|quiet] {kind} named {name}.
/ Once upon a time, a [little|kind|clever|cheerful|quiet] {kind} named {name} lived near the {home}.
/ In a small village [by a river|at the foot of a hill], there lived a {kind} named {name}.
/ {name} was a [little|kind|clever|cheerful|quiet] {kind} who lived near the {home}.""",
    "friends": """Once upon a time, there were two [good|best|old] friends, {name} and {name2}.
/ Once upon a time, a {kind} named {name} had a [good|best|dear] friend named {name2}.
/ {name} and {name2} were [good|best|old] friends. They played together every day.
/ {name} lived near the {home}. {His} [good|best] friend {name2} lived [next door|across the road].""",
    "owns": """{He} had {a_thing}, and {he} loved to {use} {them}.
/ {His} [mother|father|grandmother|grandfather] had given {him} {a_thing}. {name} loved to {use} {them}.
/ What {he} loved most was {a_thing}. {He} wanted to {use} {them} all day.""",
    "day": """One {weather} [morning|day|afternoon], {sky}.
/ It was a {weather} [morning|day|afternoon], and {sky}.""",
    "go": """{name} {prepare} and [went|walked] to the {place}.
/ {name} {prepare} and [ran to|set out for] the {place}.""",
    "evening": """That evening, {evening}.
/ When {evening}, {name} [was in bed|slept well].""",
}

PLOTS = {
    "lost": """@opening @owns @day @go
But [back at home|at {his} own door], the {thing} {was} gone! Because of {cause}, {he} had not seen {them} fall.
/ But on the way home, {he} stopped. Where {was} the {thing}? Because of {cause}, {he} had not seen {them} fall.
@sad
"[What is wrong|Why are you so sad]?" asked {his} friend {name2}. "I [have lost|cannot find] my {thing}," {he} said.
"[Do not worry|Do not cry]," said {name2}. "We will find {them} together."
They looked {spot1}, but found only [dry leaves|an old shoe|a sleeping cat|a broken pot].
Then {name2} looked {spot2}. "Here {it} {is}!" {he2} [called|shouted].
/ Just then, {an_animal} {cried}. It was waiting {spot2}, right next to the {thing}!
@happy|grateful
/ "Thank you! You are a true friend," said {name}, and [{he} hugged {name2}|they both laughed].
@evening [From that day on, {name} held the {thing} tight.|Two can find what one has lost.]""",
    "share": """@opening @day
{His} [mother|father|grandmother] gave {him} {some_food}. {name} {prepare} and [went|walked] to the {place}.
There {he} [saw|met] {name2}, who sat alone {spot1} and [looked sad|looked at the ground|did not play].
"[What is wrong|Are you not well]?" asked {name}. "[I forgot my lunch|{An_animal} ate my lunch]," said {name2}.
/ "I am hungry," said {name2}. "[My lunch fell in the mud|I had no breakfast|{An_animal} took my lunch]."
{name} looked at the {food}. {He} was hungry too. But then {he} {food_split} and gave half to {name2}.
/ {name} thought for a moment. Then {he} smiled, {food_split} and gave half to {name2}.
"Thank you! {food_this_is} the best {food} in the [world|village]," said {name2}, and they ate [side by side|together].
The next day, {name} had nothing to eat. {name2} came with {some_food2}. "Today I will share with you," {he2} said.
/ A week later, {name} forgot {his} lunch. "You shared with me," said {name2}, "so now I share with you."
@grateful|happy [When you share what you have, you win a friend.|From that day on, they often ate together.]""",
    "rescue": """@opening @day
{name} {prepare} and [went|walked] to the {animal_place}. There {he} heard a [small|strange|sad] sound.
A [little|young] {animal} {trouble}. It {cried} and looked at {him} with [big|round] eyes.
"Do not be afraid," said {name}. {He} tried to help, but {he} was too small.
/ "Poor {animal}!" said {name}. {He} tried and tried, but {he} could not do it alone.
So {he} ran to {name3}, the {kind3}. "Please [come quickly|help us]!" {he} [cried|called]. "We need {tool}!"
{name3} took {tool} and ran with {him}. Together they {rescue}.
/ {name3} [took|found] {tool}, and they ran back. {name} [helped|watched] while {name3} {rescue}.
The {animal} was safe[ at last|]! It rubbed its head on {his} hand. {name} gave it {animal_food} [to eat|for supper].
@proud|happy [From that day on, the {animal} came to see {name} every day.|Even someone small can be a big help.]""",
    "broken": """@friends @day
{name2} had {a_thing}. "You may {use} {them} today," {he2} told {name}, "but please be careful."
{name} ran [to the {place}|home]. But {he} {slip}, and the {thing} {happened}!
@afraid|worried {He} hid the {thing} under {his} bed and did not tell anyone. That night, {he} could not sleep.
In the morning, {he} [went|walked] to {name2}. "I {did} your {thing}," {he} said. "I am [so|very] sorry."
{name2} was [angry|quiet|sad] for a moment. Then {he2} said, "Thank you for telling me the truth."
They took the {thing} to {name3}, the {kind3}, who {mend}. Soon {it} {was} as good as new.
/ Together they {mend}. [At last|In the end], {it} {was} as good as new.
@happy|grateful
[It is good to tell the truth.|From that day on, {name} always told the truth.]""",
    "quarrel": """@friends @day
{name3}, the {kind3}, gave the two children {a_thing}. "{It} {is} for both of you," {he3} said.
"I want to {use} {them} first!" [cried|shouted] {name}. "No, I do!" [cried|shouted] {name2}.
@angry {name} pulled, and {name2} pulled too. They pulled harder and harder until the {thing} {happened}.
{name2} began to cry. "[Look|See] what we have done," said {name}. "I am sorry."
/ "Oh no!" said {name2}. "This is my fault." "It is my fault too," said {name}.
So they sat down and {mend}. {name} held {them}, and {name2} did the work.
/ They ran to {name3} and told {him3} everything. {He3} showed them what to do, and they {mend}.
"You may go first," said {name}. {name2} [smiled|laughed]. "We will take turns," {he2} said.
@happy|grateful
[When two friends share, both of them win.|From that day on, they shared everything.]""",
    "cook": """@opening @day {name3}, the {kind3}, was [tired|ill]. {name} wanted to make {some_dish} for {him3}.
[First {he}|{He}] {prepare} and went to the {source1} for {ing1}. Then {he} went to the {source2} to get {ing2}.
{name} began to cook. But {he} fell asleep by the fire, and soon the {dish} {dish_was} black!
/ {name} put everything over the fire. But then {he} went out to play, and soon the {dish} {dish_was} black!
@sad|angry
{name2} smelled the smoke and came in. "We can try again," {he2} said. "This time, I will watch the [fire|clock]."
This time, the {dish} {dish_was} [perfect|just right]. They took {dish_them} to {name3} at once.
"{dish_this_is} the best {dish} in the [world|village]!" said {name3}. {He3} ate and [felt much better|began to sing].
@proud|happy
[When something goes wrong, take a deep breath and try again.|From that day on, {name} always watched the fire.]""",
    "race": """Once upon a time, there was a {kind} named {name} who was the fastest child in the village.
"Nobody is as fast as I am," {he} [always said|said every day|told everyone].
@day "[Let us race|I will race you] to the {place}," said {name2}. {name} laughed, because {name2} was [slow|small].
"One, two, three, go!" called {name3}, the {kind3}. {name} ran so fast that {he} was soon far ahead.
But then {he} {slip}. {He} hurt {his} [foot|knee].
@afraid|angry {name2} came along the road. {He2} could have won, but {he2} stopped. "Lean on me," {he2} said.
/ Soon {name2} was there. "Go on and win," said {name}. "No," said {name2}. "I will help you."
Arm in arm, they walked to the {place}. {name3} [clapped|smiled] and gave them {some_food}.
"Why did you stop?" asked {name}. "A friend is [better|worth more] than a race," said {name2}.
@grateful|surprised
[From that day on, {name} never laughed at {name2} again.|It is good to be fast, but it is better to be kind.]""",
    "guide": """@opening @lonely
Then a [thin|hungry|lost] {animal} came to {his} door. It {cried} and looked up at {him}.
{name} gave it {animal_food}. The next day it came again, and soon they were friends.
@day @go {He} [stayed|played] {where} until it was dark. Because of {cause}, {he} could not find the way home.
@afraid|tired
Then something {cried} {spot1}. It was the {animal}! It [walked|went] ahead, stopped, and looked back at {him}.
{name} followed it [over the bridge and |]past the {home}. At last {he} saw the light of {his} own house!
@grateful|surprised
[When you are kind, kindness comes back to you.|From that day on, the {animal} lived with {him}.]""",
    "seed": """@opening @day
{name3}, the {kind3}, gave {name} a [tiny|small|round] seed. "Give it water every day," {he3} said, "and wait."
{name} put the seed in the ground behind {his} house. {He} looked every day, but nothing [happened|came up].
"Your seed is [dead|only a stone]," said {name2}, and [laughed|went away].
@sad|angry "Shall I dig it up?" {he} asked {name3}. "No," said {name3}. "Good things [take time|are slow]."
The sun came, and the rain came. One morning, {he} saw a green leaf!
It grew and grew, until it was a big {plant}. {name2} came to see it. "I was wrong," {he2} said. "I am sorry."
@proud|surprised {name} gave {name2} a seed from the {plant}. "Now you can grow [one|a {plant}] too," {he} said.
[Those who wait will see good things.|The next year, there was a big {plant} behind every house.]""",
}
# The weathers and places in which a plot makes no sense.
NEVER_IN = {"cook": ("snowy",), "seed": ("snowy",), "guide": ("sunny", "windy", "market", "garden", "square")}


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def pick_two(rng: random.Random, items: Sequence[Item]) -> tuple[Item, Item]:
    first = int(rng.random() * len(items))
    second = (first + 1 + int(rng.random() * (len(items) - 1))) % len(items)
    return items[first], items[second]


def with_article(noun: str) -> str:
    """Return the noun behind `a` or `an`; right for the words of this world, which has no "hour" or "unicorn"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _parse_plot(text: str) -> list[list[tuple]]:
    """Return the beats of a plot: for each its lines, a line being a row of choices (fixed text is one choice)."""
    text = re.sub(r"@(\S+) ?", lambda names: "\n/ ".join(SHARED[name] for name in names[1].split("|")) + "\n", text)
    beats = []
    for line in filter(None, text.splitlines()):
        if not line.startswith("/ "):
            beats.append([])
        parts = re.split(r"\[(.*?)\]", line.removeprefix("/ "))
        beats[-1].append(tuple(tuple(part.split("|")) if i % 2 else (part,) for i, part in enumerate(parts)))
    return beats


@cache
def person_words(person: Person, key: str) -> dict[str, str]:
    he, him, his = PRONOUNS[person.pronoun]
    words = {"name": person.name, "kind": person.kind, "he": he, "him": him, "his": his}
    words |= {"He": he.capitalize(), "His": his.capitalize()}
    return {word + key: value for word, value in words.items()}


@cache
def _food_words(food: Food, key: str) -> dict[str, str]:
    it, them, was, this_is = ("they", "them", "were", "These are") if food.plural else ("it", "it", "was", "This is")
    words = {"it": it, "them": them, "was": was, "this_is": this_is, "split": food.split}
    return {key: food.name, f"some_{key}": food.some, **{f"{key}_{word}": value for word, value in words.items()}}


@cache
def thing_words(thing: Thing, colour: str) -> dict[str, str]:
    it, them, is_, was = ("they", "them", "are", "were") if thing.plural else ("it", "it", "is", "was")
    name = f"{colour} {thing.name}"
    happened, did, mend = DAMAGES[thing.damage]
    words = {"thing": name, "a_thing": f"a pair of {name}" if thing.plural else with_article(name), "use": thing.use}
    words |= {"it": it, "It": it.capitalize(), "them": them, "is": is_, "was": was}
    return words | {"happened": happened, "did": did, "mend": mend}


def _choose_cast(rng: random.Random, weathers: Sequence[Weather], places: Sequence[Place]) -> dict[str, str]:
    """Return every word that a plot can ask for, drawn from the world for one story."""
    child, friend = pick_two(rng, CHILDREN)
    place, home = pick_two(rng, places)
    spot1, spot2 = pick_two(rng, place.spots)
    food, food2 = pick_two(rng, FOODS)
    dish, animal, weather = pick(rng, DISHES), pick(rng, ANIMALS), pick(rng, weathers)
    an_animal = with_article(animal.name)
    words = animal._asdict() | weather._asdict() | {"weather": weather.name, "plant": pick(rng, PLANTS)}
    words |= {"animal": animal.name, "animal_food": animal.food, "animal_place": animal.place}
    words |= {"an_animal": an_animal, "An_animal": an_animal.capitalize()}
    words |= {"place": place.name, "where": place.where, "spot1": spot1, "spot2": spot2, "home": home.name}
    (words["ing1"], words["source1"]), (words["ing2"], words["source2"]) = ((i, INGREDIENTS[i]) for i in dish.made_of)
    words |= person_words(child, "") | person_words(friend, "2") | person_words(pick(rng, GROWN_UPS), "3")
    words |= _food_words(food, "food") | _food_words(food2, "food2") | _food_words(dish, "dish")
    return words | thing_words(pick(rng, THINGS), pick(rng, COLOURS))


DISHES = tuple(food for food in FOODS if food.made_of)
SHARED |= {
    feeling.name: "\n/ ".join(f"{{name}} [was very|felt] {feeling.name}. {sign}" for sign in feeling.signs)
    + f"\n/ {{name}} was [so|very, very] {feeling.name}."
    for feeling in FEELINGS
}
STORY_KINDS = []  # for each plot: its beats, its weathers, its places
for _plot, _text in PLOTS.items():
    _rows = ([row for row in rows if row.name not in NEVER_IN.get(_plot, ())] for rows in (WEATHERS, PLACES))
    STORY_KINDS.append((_parse_plot(_text), *_rows))


def generate_stories(num_stories: int, seed: int = 0) -> Iterator[str]:
    """Generate short stories of the village, each a paragraph of about 150 words without line breaks.

    Story `i` depends on `seed` and `i` alone: fewer stories are a prefix of more, on every platform.

    Args:
        num_stories: how many stories.
        seed: another seed gives other stories of the same world.

    Returns:
        An iterator over the stories, made while it is read; about 770 bytes a story.

    Raises:
        ValueError: `num_stories` is negative.

    Example:
        >>> text = "\\n\\n".join(generate_stories(2000, seed=1))
    """
    if num_stories < 0:
        raise ValueError(f"num_stories is {num_stories}; it must be 0 or more")
    return (_tell_story(random.Random(f"{seed}:{i}")) for i in range(num_stories))


def _tell_story(rng: random.Random) -> str:
    beats, weathers, places = pick(rng, STORY_KINDS)
    cast = _choose_cast(rng, weathers, places)
    lines = ("".join(pick(rng, choices) for choices in pick(rng, beat)) for beat in beats)
    # Twice, because words of the cast hold pronouns of it.
    return " ".join(lines).format_map(cast).format_map(cast)
