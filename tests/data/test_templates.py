"""Third-party chat templates: the same tokens as with transformers, and a one-line error for a malicious one."""

import resource
import sys
import time

import pytest

from hfgpt.data import templates
from hfgpt.data.templates import LONGEST_TEMPLATE, TEMPLATES, check_chat_template, encode_chat, set_chat_template
from hfgpt.errors import InputError
from hfgpt.tokenizer import train_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello é \ud800"},
    {"role": "assistant", "content": " World "},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Yes"},
]
OTHERS = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | upper }}: "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@pytest.fixture
def tokenizer():
    return train_tokenizer(["any text"], vocab_size=300)


@pytest.mark.parametrize("template", [OTHERS, TEMPLATES["chat"] + " ", {"default": OTHERS, "tools": "x"}])
def test_a_third_party_template_gives_the_same_tokens_as_transformers(template, tokenizer):
    tokenizer.chat_template = template
    messages = [{**message, "content": message["content"].replace("\ud800", "")} for message in MESSAGES]
    for settings in ({"return_assistant_tokens_mask": True}, {"add_generation_prompt": True}):
        expected = tokenizer.apply_chat_template(messages, return_dict=True, **settings)
        assert dict(encode_chat(tokenizer, messages, **settings)) == dict(expected)


def test_our_own_templates_are_rendered_in_this_process(tokenizer, monkeypatch):
    monkeypatch.delattr(templates, "_render_apart")
    for name in TEMPLATES:
        set_chat_template(tokenizer, name)
        expected = tokenizer.apply_chat_template(MESSAGES[3:], return_dict=True)
        assert dict(encode_chat(tokenizer, MESSAGES[3:])) == dict(expected)


@pytest.mark.parametrize(
    ("template", "fact"),
    [
        ("{% for message in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages[0].append(1) }}", "UndefinedError: 'dict object' has no attribute 'append'"),
        ("{{ nothing.there.is }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ messages + 1 }}", "TypeError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ raise_exception('no\n\x1b[2J') }}", "TemplateError: no"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError: "),
        ("{{ range(10**9) | list }}", "OverflowError: Range too big"),
        ("{{ '%10000000000000000000000d' % 1 }}", "ValueError: width too big"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ 'a' | center(10**10) }}", "MemoryError"),
        ("{{ '{:>3000000000}'.format(1) }}", "MemoryError"),
        ("{{ ([1] * 10**10) | length }}", "MemoryError"),
        (
            "{{ 'a' * (2 * 10**7) }}",
            "ValueError: the rendered text has 20,000,000 characters, the limit is 16,777,216",
        ),
        ("{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}", "ValueError: its {% generation"),
    ],
)
def test_an_error_in_a_template_is_one_line(template, fact, tokenizer):
    if fact == "MemoryError" and sys.platform != "linux":
        pytest.skip("only Linux enforces a limit on the address space")
    tokenizer.chat_template = template
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as refused:
        encode_chat(tokenizer, MESSAGES)
    assert str(refused.value).startswith(f"the tokenizer's chat template fails ({fact}")
    assert str(refused.value).endswith("): fix its chat_template.jinja")
    assert "\n" not in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "below 256 MiB"


def test_an_endless_template_is_stopped_and_the_next_one_rendered(tokenizer, monkeypatch):
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = "{% if messages[0].content == 'now' %}" + loops + "{% endif %}"
    check_chat_template(tokenizer)  # behaves until it is triggered
    monkeypatch.setattr(templates, "RENDERING_SECONDS", 0.5)
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"fails \(rendering took more than 0.5 seconds, or crashed\)"):
        encode_chat(tokenizer, [{"role": "user", "content": "now"}])
    assert time.perf_counter() - started < 10
    monkeypatch.undo()
    tokenizer.chat_template = OTHERS
    assert check_chat_template(tokenizer) == OTHERS


def test_a_template_that_is_too_long_or_one_of_several_is_refused(tokenizer):
    tokenizer.chat_template = "x" * (LONGEST_TEMPLATE + 1)
    with pytest.raises(InputError, match=r"has 100,001 characters, the limit is 100,000"):
        encode_chat(tokenizer, MESSAGES)
    tokenizer.chat_template = {"one": "x", "other": "y"}
    with pytest.raises(InputError, match=r"does not have a default chat template \(This model has multiple"):
        check_chat_template(tokenizer)
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(InputError, match=r"ZeroDivisionError"):
        set_chat_template(tokenizer, None)
    set_chat_template(tokenizer, "chat")  # which replaces it
