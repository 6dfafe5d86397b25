"""Spaces: their files, and their app.py with local models and a stub of gradio."""

import io
import runpy
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console

from hfgpt.commands import publish as task
from hfgpt.commands.publish import PublishArguments, publish
from hfgpt.errors import InputError
from hfgpt.hub.space import write_space
from hfgpt.hub.usage import Place
from hfgpt.models import find_model


@pytest.fixture
def send(monkeypatch):
    """Publishes a folder without the check in a separate process; returns the output."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(task, "check_as_stranger", lambda *args, **kwargs: None)

    def send(folder, repo_id="me/model", *overrides, **options) -> str:
        console = Console(file=io.StringIO(), width=400)
        publish(str(folder), repo_id, PublishArguments(measure=False, **options), overrides, console)
        return console.file.getvalue()

    return send


class Gradio(ModuleType):
    """A stub that records its components and warnings."""

    def __init__(self):
        super().__init__("gradio")
        self.warnings = []
        self.Warning = self.warnings.append
        for name in ("Interface", "ChatInterface", "Textbox", "Label", "Chatbot"):
            setattr(self, name, lambda *args, _kind=name, **kw: SimpleNamespace(kind=_kind, args=args, **kw))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the app.py of a Space for a local model; returns its page and the stub."""

    def start(model):
        shutil.rmtree(tmp_path / "space", ignore_errors=True)
        write_space(tmp_path / "space", Place(str(model)), None, private=False)
        monkeypatch.setitem(sys.modules, "gradio", gradio := Gradio())
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        return runpy.run_path(str(tmp_path / "space" / "app.py"))["page"], gradio

    return start


def load(folder):
    saved = find_model(str(folder))
    return saved.load().float().eval(), saved.load_tokenizer()


def greedy(folder, inputs, new_tokens=200) -> str:
    """The likeliest tokens one by one, each from the whole text."""
    model, tokenizer = load(folder)
    ids = inputs["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(min(new_tokens, model.config.max_position_embeddings - length)):
            token = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            if token.item() == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def test_a_model_is_published_with_a_space(hub, run, send):
    shown = send(run, space="me/model", private=False)
    commit = hub.repositories["me/model"].branches["main"]
    space = hub.repositories["spaces/me/model"]
    files = hub.files("spaces/me/model")
    assert files.keys() == {"README.md", "app.py", "requirements.txt"}
    assert (space.private, space.messages) == (False, ["Run me/model"])
    assert shown.count("uploaded and verified") == 2
    assert f"published: {hub.url}/spaces/me/model (public)" in shown
    app = files["app.py"].decode()
    assert 'MODEL = "me/model"' in app
    assert f'OPTIONS = {{"revision": "{commit}", "trust_remote_code": True}}' in app
    assert f"transformers=={__import__('transformers').__version__}\n" in files["requirements.txt"].decode()
    assert "+" not in files["requirements.txt"].decode()
    card = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (card["title"], card["sdk"], card["app_file"]) == ("model", "gradio", "app.py")
    assert (card["models"], card["license"]) == (["me/model"], "mit")
    assert card["sdk_version"] == "6.31.0"
    # Again: nothing has changed. With another model, the Space runs the new commit.
    send(run, space="me/model", private=False)
    assert space.messages == ["Run me/model"]
    (run / "notes.txt").write_text("New.")
    send(run, space="me/model", private=False)
    commit = hub.repositories["me/model"].branches["main"]
    assert f'"{commit}"' in hub.files("spaces/me/model")["app.py"].decode()


def test_a_private_model_and_a_name_for_its_space(hub, run, send):
    send(run, space="me/try-it", format="gpt2")
    assert hub.repositories["spaces/me/try-it"].private
    files = hub.files("spaces/me/try-it")
    assert '"trust_remote_code": False' in files["app.py"].decode()
    assert "`HF_TOKEN`" in files["README.md"].decode()


def test_a_dry_run_shows_the_files_of_the_space(hub, run, send):
    shown = send(run, space="me/model", dry_run=True)
    assert "(Space me/model):" in shown
    assert "  app.py\n" in shown
    assert hub.log == []


def test_what_no_space_is_made_for(hub, runs, run, send):
    with pytest.raises(InputError, match="leave out --create-pr"):
        PublishArguments(space="me/model", create_pr=True)
    for name in ("model", "me/a b", ""):
        with pytest.raises(InputError, match="--space-name '"):
            PublishArguments(space=name)
    with pytest.raises(InputError, match="--space needs a model, not an adapter"):
        send(runs / "adapter", "me/adapter", "--hub.base_model", "me/text", space="me/adapter")
    assert hub.log == []
    hub.create("spaces/me/model", private=True, files={"app.py": b"mine"})
    with pytest.raises(InputError, match=r"'me/model' contains app\.py but not a Space of hfgpt"):
        send(run, space="me/model")
    assert hub.files("spaces/me/model") == {"app.py": b"mine"}
    assert "me/model" not in hub.repositories, "the model was not uploaded"


def test_the_app_continues_a_text(runs, start):
    page, gradio = start(runs / "text")
    (continue_text, *_) = page.args
    tokenizer = load(runs / "text")[1]
    assert continue_text("The") == "The" + greedy(runs / "text", tokenizer("The", return_tensors="pt"))
    end = tokenizer(tokenizer.eos_token, return_tensors="pt")
    assert continue_text("") == greedy(runs / "text", end)
    continue_text("e" * 63)
    assert gradio.warnings == []
    assert continue_text("e" * 64) == "e" * 64
    assert gradio.warnings == ["The text has 64 tokens: shorten it to at most 63."]


def test_the_app_gives_the_probability_of_each_class(runs, start):
    page, gradio = start(runs / "classes")
    model, tokenizer = load(runs / "classes")
    with torch.no_grad():
        expected = model(**tokenizer("Dear Mia!", return_tensors="pt")).logits[0].softmax(-1).tolist()
    found = page.args[0]("Dear Mia!")
    assert list(found) == list(model.config.id2label.values())
    assert list(found.values()) == pytest.approx(expected, abs=1e-6)
    assert page.args[0]("e" * 65) == {}
    assert gradio.warnings == ["The text has 65 tokens: shorten it to at most 64."]


def test_the_app_answers_in_a_conversation(runs, start):
    page, gradio = start(runs / "answers")
    (answer,) = page.args
    assert page.kind == "ChatInterface"
    tokenizer = load(runs / "answers")[1]

    def expected(*turns: str) -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return greedy(runs / "answers", tokenizer.apply_chat_template(messages, **options))

    assert answer("Hi", []) == expected("Hi")
    turns = [{"role": "user", "content": [{"type": "text", "text": "A"}]}, {"role": "assistant", "content": "B"}]
    assert answer("Hi", turns) == expected("A", "B", "Hi")
    refused = [{"role": "user", "content": "x" * 999}, {"role": "assistant", "content": ""}]
    assert answer("Hi", [*refused, *turns]) == expected("A", "B", "Hi")
    full = [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "y"}]
    assert answer("Hi", full) == expected("Hi"), "the oldest turns are left out"
    assert gradio.warnings == []
    assert answer(tokenizer.eos_token, []) == ""
    assert answer("x" * 999, []) == ""
    assert len(gradio.warnings) == 2
