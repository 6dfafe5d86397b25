"""`hfgpt serve`: the requests that are refused, without the packages of the server; see also tests/engines."""

import socket

import pytest

from hfgpt.commands.serve import check_packages, is_local, listen
from hfgpt.data.templates import render_letters, set_chat_template
from hfgpt.errors import InputError
from hfgpt.serving.requests import read_chat, read_completion
from hfgpt.tokenizer import train_tokenizer

CONTEXT = 400


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer([render_letters("alpaca") + "Who? Why? abcdef"], kind="char")
    set_chat_template(tokenizer, "alpaca")
    return tokenizer


def ask(text: str = "Who?", **fields) -> dict:
    return {"messages": [{"role": "user", "content": text}], **fields}


def test_new_tokens_are_limited_to_the_context(tokenizer):
    for asked, expected in ((None, CONTEXT - 4), (3, 3), (10**30, CONTEXT - 4)):
        body = {"prompt": "Who?", "max_tokens": asked}
        assert read_completion(body, tokenizer, CONTEXT) == tokenizer("Who?")["input_ids"]
        assert body["max_tokens"] == expected
        body = ask(max_tokens=asked)
        room = CONTEXT - len(read_chat(body, tokenizer, CONTEXT))
        assert body["max_tokens"] == body["max_completion_tokens"] == (3 if asked == 3 else room)
    body = ask(max_completion_tokens=2, max_tokens=5)
    read_chat(body, tokenizer, CONTEXT)
    assert body["max_completion_tokens"] == 2


def test_unknown_characters_become_the_unknown_token(tokenizer):
    assert read_completion({"prompt": "Ж"}, tokenizer, CONTEXT) == [tokenizer.unk_token_id]


def test_an_empty_prompt_starts_a_new_document(tokenizer):
    body = {"prompt": ""}
    assert read_completion(body, tokenizer, CONTEXT) == [tokenizer.eos_token_id]
    assert body["prompt"] == tokenizer.eos_token


def test_messages_are_those_of_the_chat_template(tokenizer):
    parts = [{"type": "text", "text": "Who?"}, {"type": "text", "text": "Why?"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    messages = [{"role": "user", "content": "Who? Why?"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert read_chat(body, tokenizer, CONTEXT) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a" * CONTEXT}, "the prompt has 400 tokens, which leaves no room in the context of 400"),
        ({"prompt": "\ud800"}, "the tokenizer cannot encode the prompt"),
        ({"prompt": ["a"]}, "prompt must be one text"),
        ({"prompt": None}, "prompt must be one text"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be an integer, at least 1"),
        ({"max_tokens": -1}, "max_tokens is -1; it must be an integer, at least 1"),
        ({"max_tokens": True}, "max_tokens is True; it must be an integer"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; it must be an integer"),
        ({"max_tokens": "5"}, "max_tokens is '5'; it must be an integer"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number, 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0}, "top_p is 0; it must be a number, above 0, at most 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"n": 2}, "n is not supported: leave it out"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"echo": True}, "echo is not supported"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias is not supported"),
        ({"generation_config": "{}"}, "generation_config is not supported"),
        ({"logprobs": 21}, "logprobs is 21; it must be an integer, 0 to 20"),
        ({"stop": ""}, "stop must be a text, or a list of texts, none of them empty"),
        ({"stop": [1]}, "stop must be a text, or a list of texts"),
        ({"stop": "a", "stream": True}, "logprobs and stop are not supported with stream"),
        ({"logprobs": 1, "stream": True}, "logprobs and stop are not supported with stream"),
        ({"stream": "yes"}, "stream must be true or false"),
    ],
)
def test_completions_that_are_refused(fields, message, tokenizer):
    body = {"prompt": "Who?", **fields}
    with pytest.raises(InputError) as error:
        read_completion(body, tokenizer, CONTEXT)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            ask("a" * CONTEXT),
            "tokens with the chat template, which leaves no room for an answer in the context of 400",
        ),
        (ask("<|endoftext|>"), "a message contains the special token <|endoftext|>: remove it"),
        (ask(tools=[{"type": "function"}]), "tools is not supported"),
        (ask(response_format={"type": "json_object"}), "response_format is not supported"),
        (ask(chat_template_kwargs={"a": 1}), "chat_template_kwargs is not supported"),
        (ask(logprobs=True), "logprobs is not supported for chat"),
        (ask(stop="a"), "stop is not supported for chat"),
        (ask(max_completion_tokens=0), "max_completion_tokens is 0"),
        ({"messages": []}, "messages must be a list of objects with role and content"),
        ({"messages": "Who?"}, "messages must be a list"),
        ({}, "messages must be a list"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "a message must have a role (system, user, assistant)"),
        ({"messages": [{"role": "user"}]}, "and a text as content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "and a text as content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "and a text as content"),
    ],
)
def test_chats_that_are_refused(fields, message, tokenizer):
    with pytest.raises(InputError) as error:
        read_chat(dict(fields), tokenizer, CONTEXT)
    assert message in str(error.value)


def test_a_model_without_a_chat_template_does_not_chat():
    tokenizer = train_tokenizer(["abc"], kind="char")
    with pytest.raises(InputError, match="no chat template, so it was not trained to chat: use /v1/completions"):
        read_chat(ask(), tokenizer, CONTEXT)


def test_values_that_change_nothing_are_accepted(tokenizer):
    body = {"prompt": "Who?", "n": 1, "best_of": 1, "echo": False, "presence_penalty": 0.0, "logit_bias": {}}
    assert read_completion({**body, "temperature": 0, "top_p": 1, "logprobs": 0}, tokenizer, CONTEXT)
    assert read_chat(ask(tools=[], response_format={"type": "text"}, tool_choice="none"), tokenizer, CONTEXT)


def test_a_port_in_use_is_refused():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        match = rf"cannot listen on 127.0.0.1, port {port} \(Address already in use\): choose another --host or --port"
        with pytest.raises(InputError, match=match):
            listen("127.0.0.1", port)
        with socket.create_connection(first.getsockname()):
            pass  # it waits until the server runs


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 70, "::zz"])
def test_hosts_that_cannot_be_used(host):
    with pytest.raises(InputError, match="cannot listen on"):
        listen(host, 0)


def test_an_empty_host_is_refused():
    with pytest.raises(InputError, match=r"--host is empty: use 127\.0\.0\.1"):
        listen("", 0)


def test_addresses_of_this_machine():
    assert all(map(is_local, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.1.1", "example.org")))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("hfgpt.commands.serve.find_spec", lambda name: None if name == "gradio" else object())
    check_packages(web=False)
    match = r"needs the package gradio, which is not installed: pip install 'hfgpt\[web\]'"
    with pytest.raises(InputError, match=match):
        check_packages(web=True)
    monkeypatch.setattr("hfgpt.commands.serve.find_spec", lambda name: None)
    match = r"needs the package fastapi, which is not installed: pip install 'hfgpt\[serve\]'"
    with pytest.raises(InputError, match=match):
        check_packages(web=False)
