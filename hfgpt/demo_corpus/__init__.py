"""The corpus of the demo: stories, messages and instructions of one little village, generated from a seed.

world.py         the village, read from world.toml, and its grammar
stories.py       plots.toml -> stories
facts.py         which facts belong to which split
messages.py      messages.toml -> short notes with a label
instructions.py  instructions.toml -> instructions with their only right answer

All text is our own, and in the TOML files; the Python only draws from them. Randomness is `random.Random(text)` and
its `random()` alone, because Python promises that sequence across versions and platforms.
"""

from hfgpt.demo_corpus.instructions import generate_instructions
from hfgpt.demo_corpus.messages import generate_messages
from hfgpt.demo_corpus.stories import generate_stories

__all__ = ["generate_instructions", "generate_messages", "generate_stories"]
