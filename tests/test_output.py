"""Human-readable text on terminals of any width."""

import io

import pytest

from hfgpt.output import PlainConsole, render_pairs, wrap_text


@pytest.mark.parametrize("width", [40, 80, 140])
def test_a_paragraph_is_broken_between_words(width):
    text = "a well-known word " * 30
    lines = wrap_text(text.strip(), width, 4, 8).splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()) == text.strip()
    assert [len(line) - len(line.lstrip()) for line in lines] == [4] + [8] * (len(lines) - 1)
    assert wrap_text("x" * 200, width, 4) == "    " + "x" * 200, "words are not broken"
    assert wrap_text(text, None, 4) == f"    {text}"


def test_pairs_are_two_columns_where_there_is_room():
    pairs = [("name", "a value of words"), ("longer name", "b")]
    assert render_pairs(pairs, None) == "name         a value of words\nlonger name  b"
    assert render_pairs(pairs, 33) == "name         a value of words\nlonger name  b"
    assert render_pairs(pairs, 32) == "name\n    a value of words\nlonger name\n    b"
    assert render_pairs([("name", "a value of " + "x" * 30)], 30) == "name  a value of\n      " + "x" * 30


def test_a_console_indents_the_continuation_of_an_indented_line():
    console = PlainConsole(file=io.StringIO(), width=20)
    console.print("  one: two three four five\nnot indented, and longer than that")
    assert console.file.getvalue() == "  one: two three\n      four five\nnot indented, and \nlonger than that\n"
    console = PlainConsole(file=io.StringIO(), width=20, soft_wrap=True)
    console.print("  one: two three four five")
    assert console.file.getvalue() == "  one: two three four five\n"
