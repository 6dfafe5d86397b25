"""Templates for Ollama, rendered by Go's template engine, give the text of the Jinja templates."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from engines import ENGINES

from hfgpt.conversion.ollama import render_template
from hfgpt.data.templates import TEMPLATES
from hfgpt.tokenizer import train_tokenizer

pytestmark = pytest.mark.engine

CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Be brief."), ("user", "Say \"hi\"\nor 'hey' {{ x }}")],
    [("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", "Four\n\nfive"), ("user", "Six")],
    [("system", "Be brief."), ("user", "é€😀"), ("assistant", "\\n"), ("user", "</s><b>&amp;")],
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("go")
    environment = {**os.environ, "GOCACHE": str(folder / "cache"), "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"}
    source = Path(__file__).parent / "template.go"
    command = [ENGINES / "go" / "go" / "bin" / "go", "build", "-o", folder / "render", source]
    subprocess.run(command, env=environment, check=True)
    return folder / "render"


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(name, program):
    tokenizer = train_tokenizer(["text"], "char")
    tokenizer.chat_template = TEMPLATES[name]
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        job = json.dumps({"Template": render_template(tokenizer), "Messages": messages})
        rendered = subprocess.run([program], input=job, capture_output=True, text=True, check=True).stdout
        assert rendered == expected
