"""The demo corpus: stories, messages and instructions about a small village, generated from a seed.

world.py         the village, read from world.toml, and its grammar
stories.py       plots.toml -> stories
facts.py         which facts belong to which split
messages.py      messages.toml -> short notes with a label
instructions.py  instructions.toml -> instructions, each with its only correct answer

All text is original and in the TOML files; the Python code only samples from them. The only source of randomness is
`random.Random(text).random()`, because Python guarantees its sequence across versions and platforms.
"""

from hfgpt.demo_corpus.instructions import generate_instructions
from hfgpt.demo_corpus.messages import generate_messages
from hfgpt.demo_corpus.stories import generate_stories

__all__ = ["generate_instructions", "generate_messages", "generate_stories"]
