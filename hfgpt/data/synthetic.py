"""The embedded corpus: short stories of one little village, generated from a seed and never stored.

The first half is the world (people, animals, places, things, foods, feelings, weathers) as plain tables; the second
half is the plots. A plot is text of one beat a line: a line that starts with `/` is another way to tell the beat above
it (empty: the beat may be left out), `[a|b]` is a choice inside a line, `@name` is a beat of `SHARED`, and `{word}` is
filled from the cast of the story. Pronouns, verbs and articles come from the cast, so that they agree. All text is our own.

Source of randomness: `random.Random(f"{seed}:{i}")` and its `random()` alone, the one method whose sequence Python
promises to keep across versions.
"""

import random
import re
from collections.abc import Iterator
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
    tool: str
    rescue: str


class Place(NamedTuple):
    name: str
    where: str
    spots: tuple[str, str, str]


class Thing(NamedTuple):
    """Something to own, lose and break; a plural thing comes as a pair."""

    name: str
    use: str
    damage: str
    plural: bool = False


class Damage(NamedTuple):
    """How a thing breaks: `happened` follows the thing, `did` follows whoever did it, `mend` whoever mends it."""

    happened: str
    did: str
    mend: str


class Food(NamedTuple):
    """Something to eat; `made_of` names the ingredients of what the villagers cook."""

    name: str
    some: str
    split: str
    made_of: tuple[str, ...] = ()
    plural: bool = False


class Feeling(NamedTuple):
    name: str
    is_good: bool
    signs: tuple[str, ...]


class Weather(NamedTuple):
    """`sky` and `evening` are clauses, `prepare` and `slip` follow a name, `lost` tells why nobody saw a thing fall."""

    name: str
    sky: str
    prepare: str
    slip: str
    lost: str
    evening: str


# subject, object, possessive
PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}

CHILDREN = tuple(
    Person(name, kind, pronoun)
    for kind, pronoun, names in (
        ("girl", "she", "Mia Anna Lily Nora Ella Rosa Ivy Clara Zoe Tilda"),
        ("boy", "he", "Ben Tom Leo Sam Max Finn Hugo Oscar Noah Jack"),
    )
    for name in names.split()
)

GROWN_UPS = (
    Person("Mrs Bell", "baker", "she"),
    Person("Mr Reed", "miller", "he"),
    Person("Mrs Moss", "farmer", "she"),
    Person("Mr Finch", "teacher", "he"),
    Person("Mrs Thorn", "gardener", "she"),
    Person("Mr Flint", "smith", "he"),
    Person("Mrs Hall", "doctor", "she"),
    Person("Mr Marsh", "fisherman", "he"),
)

ANIMALS = (
    Animal("kitten", "meowed", "some milk", "orchard", "sat high up in a tree", "a ladder", "carried it down"),
    Animal("puppy", "barked", "a bone", "hill", "sat at the bottom of a deep hole", "a rope", "pulled it up"),
    Animal("lamb", "bleated", "some grass", "meadow", "was caught in the fence", "a saw", "cut it free"),
    Animal("duckling", "quacked", "some seeds", "lake", "was caught in an old net", "a knife", "cut it free"),
    Animal("rabbit", "squeaked", "a carrot", "garden", "was stuck under a gate", "a spade", "dug it out"),
    Animal("owl", "hooted", "some meat", "mill", "was shut in a dark shed", "a key", "let it out"),
    Animal("squirrel", "chattered", "a nut", "forest", "was stuck in a hollow log", "a saw", "cut it free"),
    Animal("goat", "bleated", "a turnip", "farm", "stood on the roof of the barn", "a ladder", "carried it down"),
    Animal("pony", "whinnied", "an apple", "river", "stood in deep mud", "a rope", "pulled it out"),
    Animal("mouse", "squeaked", "a crumb of cheese", "market", "was shut in a box", "a key", "let it out"),
    Animal("fox", "whined", "an egg", "forest", "sat at the bottom of a deep pit", "a rope", "pulled it up"),
    Animal("crow", "cawed", "some corn", "square", "was caught in a long string", "a knife", "cut it free"),
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
    Thing("kite", "fly", "tear"),
    Thing("ball", "play with", "tear"),
    Thing("hat", "wear", "tear"),
    Thing("doll", "play with", "tear"),
    Thing("book", "read", "tear"),
    Thing("umbrella", "carry", "tear"),
    Thing("ribbon", "wear", "tear"),
    Thing("drum", "play", "crack"),
    Thing("flute", "play", "crack"),
    Thing("cup", "drink from", "crack"),
    Thing("boat", "play with", "crack"),
    Thing("lantern", "carry", "crack"),
    Thing("whistle", "blow", "crack"),
    Thing("top", "spin", "crack"),
    Thing("basket", "carry", "break"),
    Thing("cart", "pull", "break"),
    Thing("puppets", "play with", "tear", plural=True),
    Thing("glasses", "wear", "crack", plural=True),
    Thing("drumsticks", "play with", "crack", plural=True),
)

DAMAGES = {
    "tear": Damage("tore", "tore", "sewed {them} with a needle and thread"),
    "crack": Damage("cracked", "cracked", "put some strong glue on {them}"),
    "break": Damage("came apart", "broke", "mended {them} with a hammer and nails"),
}

INGREDIENTS = {
    "flour": "mill",
    "apples": "orchard",
    "carrots": "garden",
    "eggs": "farm",
    "milk": "farm",
    "honey": "market",
    "salt": "market",
    "berries": "forest",
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
    Food("berries", "a basket of berries", "made two piles of the berries", plural=True),
    Food("nuts", "a bag of nuts", "made two piles of the nuts", plural=True),
)

FEELINGS = (
    Feeling("happy", True, ("{He} smiled from ear to ear.", "{He} wanted to sing and dance.")),
    Feeling("proud", True, ("{He} held {his} head high.", "{He} told everyone about it.")),
    Feeling("grateful", True, ("{He} did not know what to say.", "{He} had tears of joy in {his} eyes.")),
    Feeling("surprised", True, ("{He} opened {his} eyes wide.", "{He} could hardly speak.")),
    Feeling("sad", False, ("Tears ran down {his} cheeks.", "{He} sat down and cried.")),
    Feeling("afraid", False, ("{His} knees shook.", "{His} heart beat fast.")),
    Feeling("angry", False, ("{His} face turned red.", "{He} stamped {his} foot.")),
    Feeling("lonely", False, ("The day was long and quiet.", "There was nobody to talk to.")),
    Feeling("worried", False, ("{He} walked up and down.", "{He} could not eat {his} supper.")),
    Feeling("sorry", False, ("{He} looked at the ground.", "{His} voice was very small.")),
    Feeling("tired", False, ("{His} legs were heavy.", "{He} could hardly keep {his} eyes open.")),
)

WEATHERS = (
    Weather(
        "sunny",
        "the sky was blue and the birds sang",
        "left the coat at home",
        "looked up at the birds and fell over a stone",
        "{He} had put {them} down to rest in the sun, and then {he} had walked on.",
        "the sun went down and the sky turned pink",
    ),
    Weather(
        "rainy",
        "the rain fell on the roofs",
        "put on a raincoat",
        "slipped on the wet path",
        "{He} had run so fast to get out of the rain that {he} had not seen {them} fall.",
        "the rain stopped and the stars came out",
    ),
    Weather(
        "windy",
        "the wind shook the trees",
        "put on a warm cap",
        "ran against the wind and fell",
        "The wind was so loud that {he} had not heard {them} fall.",
        "the wind grew tired and the trees stood still",
    ),
    Weather(
        "snowy",
        "white snow lay on the roofs",
        "put on a thick coat",
        "slipped on the ice",
        "The snow was so soft that {he} had not heard {them} fall.",
        "the snow shone in the light of the moon",
    ),
    Weather(
        "foggy",
        "a thick fog hid the houses",
        "took a small lamp",
        "did not see a stone in the fog and fell over it",
        "The fog was so thick that {he} had not seen {them} fall.",
        "the fog went away and the moon came out",
    ),
    Weather(
        "cloudy",
        "grey clouds hung over the village",
        "put on an old coat",
        "looked up at the clouds and fell over a root",
        "{He} had looked up at the clouds and had not seen {them} fall.",
        "the clouds went away and the stars came out",
    ),
)

PLANTS = ("sunflower", "pumpkin", "melon", "cabbage", "rose")


class Plot(NamedTuple):
    """A plot and the names of the weathers it cannot happen in."""

    text: str
    never_in: tuple[str, ...] = ()


SHARED = {
    "opening": """
Once upon a time, there was a [little|kind|clever|cheerful|quiet] {kind} named {name}.
/ Once upon a time, a [little|kind|clever|cheerful|quiet] {kind} named {name} lived near the {home}.
/ In a small village [by a river|at the foot of a hill], there lived a {kind} named {name}.
/ {name} was a [little|kind|clever|cheerful|quiet] {kind} who lived near the {home}.""",
    "friends": """
Once upon a time, there were two [good|best|old] friends, {name} and {name2}.
/ Once upon a time, a {kind} named {name} had a [good|best|dear] friend named {name2}.
/ {name} and {name2} were [good|best|old] friends. They lived near the {home} and played together every day.
/ {name} lived near the {home}. {His} [good|best] friend {name2} lived [next door|across the road].""",
    "owns": """
{He} had {a_thing}, and {he} loved to {use} {them}.
/ {His} [mother|father|grandmother|grandfather] had given {him} {a_thing}. {name} loved to {use} {them}.
/ What {he} loved most was {a_thing}. {He} wanted to {use} {them} all day long.""",
    "day": """
One {weather} [morning|day|afternoon], {sky}.
/ It was a {weather} [morning|day|afternoon], and {sky}.""",
    "go": """
{name} {prepare} and [went|walked] to the {place}.
/ {name} wanted to go to the {place}, so {he} {prepare} and went out.""",
    "evening": """
That evening, {evening}. {name} [fell asleep with a smile|slept well|told {his} mother all about it].
/ In the evening, {evening}, and {name} [went home with a light heart|was ready for bed|was glad].""",
}
