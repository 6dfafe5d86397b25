"""`hfgpt chat` on a terminal: what Ctrl-C and Ctrl-D do, and how the model is described. All comparisons are exact."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from hfgpt.commands.chat import describe_training, run_chat
from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.data.templates import render_letters, set_chat_template
from hfgpt.evaluation.generation import SamplingArguments, TerminalStreamer
from hfgpt.modeling_hfgpt import HfGPTForCausalLM
from hfgpt.models import load_model, load_model_tokenizer
from hfgpt.records import RunRecord
from hfgpt.serving.conversation import Chat
from hfgpt.tokenizer import train_tokenizer

GREEDY = SamplingArguments(max_new_tokens=20, greedy=True)
QUESTION = {"role": "user", "content": "Who?"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A model with random weights that never generates end of text, and a run record."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer([render_letters("alpaca") + "Who? Why? abcdef"], kind="char")
    set_chat_template(tokenizer, "alpaca")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 512}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = HfGPTForCausalLM(HfGPTConfig(vocab_size=len(tokenizer), initializer_range=1.0, **special, **size))
    model.generation_config.suppress_tokens = tokenizer.all_special_ids
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    RunRecord(task="instruct", data_source="synthetic:instructions").write(folder)
    return str(folder)


@pytest.fixture
def chat(saved) -> Chat:
    return Chat(load_model(saved), load_model_tokenizer(saved), GREEDY)


class Interrupted(TerminalStreamer):
    """Simulates Ctrl-C at the third token of every answer; the prompt arrives before the first."""

    def put(self, value):
        self.calls = getattr(self, "calls", 0) + 1
        super().put(value)
        if self.calls == 4:
            raise KeyboardInterrupt


def streamer(chat: Chat, kind=TerminalStreamer):
    return kind(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)


def test_a_stopped_answer_is_kept_in_the_history_as_far_as_it_was_shown(chat, capsys):
    whole = chat.answer("Who?", streamer(chat))
    assert capsys.readouterr().out == f"{whole}\n"
    assert chat.messages == [QUESTION, {"role": "assistant", "content": whole}]
    chat.reset()
    with pytest.raises(KeyboardInterrupt):
        chat.answer("Who?", streamer(chat, Interrupted))
    shown = capsys.readouterr().out
    assert shown == f"{whole[:3]}\n"
    assert chat.messages == [QUESTION, {"role": "assistant", "content": whole[:3].strip()}]
    assert chat.answer("Why?"), "the conversation can continue"
    assert [message["content"] for message in chat.messages[:3]] == ["Who?", whole[:3].strip(), "Why?"]


def test_a_question_interrupted_before_its_answer_is_dropped(chat, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.model, "forward", interrupt)
    for given in (streamer(chat), None):
        with pytest.raises(KeyboardInterrupt):
            chat.answer("Who?", given)
        assert chat.messages == []


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard input a terminal with these keys (or exceptions); returns the signal handlers that are set."""
    signals = []

    def type_in(*keys):
        keys = iter(keys)

        def read(prompt):
            assert prompt == "> "
            key = next(keys)
            if isinstance(key, str):
                return key
            raise key

        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("hfgpt.commands.chat._ask.__defaults__", (read,))
        monkeypatch.setattr("signal.signal", lambda *changed: signals.append(changed))
        return signals

    return type_in


def test_ctrl_c_stops_the_answer_but_not_the_program(saved, terminal, monkeypatch, capsys):
    monkeypatch.setattr("hfgpt.commands.chat.TerminalStreamer", Interrupted)
    signals = terminal("Who?", "Why?", EOFError)
    run_chat(saved, GREEDY)
    assert signals == [(signal.SIGTERM, signal.SIG_DFL)], "SIGTERM ends the program"
    first, second = capsys.readouterr().out.splitlines()
    assert (len(first), len(second)) == (3, 3), "both answers were stopped"


def test_ctrl_c_at_the_prompt_shows_how_to_quit(saved, terminal, capsys):
    terminal(KeyboardInterrupt, KeyboardInterrupt, "/exit", "not read")
    run_chat(saved, GREEDY)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[2:] == ["", "/exit or Ctrl-D quits"] * 2


def test_ctrl_d_quits_and_ends_the_line(saved, terminal, capsys):
    terminal(EOFError)
    run_chat(saved, GREEDY)
    assert capsys.readouterr().err.splitlines()[2:] == [""]


def test_ctrl_c_ends_a_chat_whose_input_is_piped(saved, monkeypatch):
    monkeypatch.setattr("hfgpt.commands.chat.TerminalStreamer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_chat(saved, GREEDY, lines=iter(["Who?", "Why?"]))


def test_a_chat_starts_with_what_the_model_was_trained_on(saved, terminal, capsys):
    terminal("/exit")
    run_chat(saved, GREEDY)
    said, help_line = capsys.readouterr().err.splitlines()
    assert said == (
        "trained on synthetic:instructions with the template alpaca; answers follow the style of the training data"
    )
    assert help_line.endswith("; Ctrl-C stops an answer; /exit or Ctrl-D quits")
    run_chat(saved, GREEDY, lines=iter(()))
    assert capsys.readouterr().err == "", "not shown for piped input"


def test_the_description_of_a_model_comes_from_its_run_record(saved, tmp_path, chat):
    tokenizer = chat.tokenizer
    assert describe_training(str(tmp_path), tokenizer) is None
    assert describe_training("somebody/model", tokenizer) is None
    RunRecord(task="instruct").write(tmp_path)
    assert describe_training(str(tmp_path), tokenizer) is None, "the record has no data source"
    RunRecord(task="instruct", data_source="/home/me/rows.json").write(tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    tokenizer.chat_template += " "
    for folder in (tmp_path, tmp_path / "checkpoint-5"):
        said = describe_training(str(folder), tokenizer)
        assert said == "trained on rows.json; answers follow the style of the training data", (
            "not one of the built-in templates"
        )
    RunRecord(task="pretrain", data_source="me/texts").write(tmp_path)
    assert describe_training(str(tmp_path), tokenizer) == "trained on me/texts, but not on instructions"


# Makes the terminal its controlling terminal, so that keys become signals, and presses Ctrl-C during each answer.
SCRIPT = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in background jobs
from hfgpt import cli
from hfgpt.evaluation.generation import TerminalStreamer
put = TerminalStreamer.put
def put_and_interrupt(self, value):
    put(self, value)
    self.calls = getattr(self, "calls", 0) + 1
    if self.calls == 4:
        os.kill(os.getpid(), signal.SIGINT)
TerminalStreamer.put = put_and_interrupt
sys.argv = ["hfgpt", "chat", sys.argv[1], "--greedy", "--max-new-tokens", "20"]
cli.main()
"""


def test_keys_on_a_real_terminal(saved, chat):
    """Each key is pressed after the expected output is shown; Ctrl-C again, if Python was about to read a line.

    Between writing the prompt and waiting for input, Python's `input` only notices a signal when the next one arrives.
    """
    answer = chat.answer("Who?")[:3]
    ours, theirs = pty.openpty()
    words, plain = [sys.executable, "-c", SCRIPT, saved], {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    process = subprocess.Popen(words, env=plain, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)

    def is_shown(pattern: str, seconds: float) -> bool:
        shown, end = "", time.monotonic() + seconds
        while not re.search(pattern, shown):
            if not select.select([ours], [], [], max(end - time.monotonic(), 0))[0]:
                return False
            try:
                shown += os.read(ours, 4096).decode()
            except OSError:  # raised on Linux when the other end is closed
                pytest.fail(f"the program ended early: {shown}")
        return True

    def press(key: bytes) -> bool:
        return os.write(ours, key) > 0

    try:
        assert is_shown("Ctrl-D quits\\s+> $", 200)
        assert any(press(b"\x03") and is_shown("/exit or Ctrl-D quits\\s+> $", 5) for _ in range(40))
        assert press(b"Who?\n")
        assert is_shown(f"{re.escape(answer)}\\s+> $", 200)
        assert press(b"\x04")
        assert process.wait(200) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
