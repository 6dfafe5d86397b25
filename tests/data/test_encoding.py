"""gigatoken gives the tokens of the tokenizers library, or is not used."""

import random
import sys
from types import SimpleNamespace

import pytest

from hfgpt.data import encoding
from hfgpt.data.encoding import Encoding, load_gigatoken
from hfgpt.demo_corpus import generate_stories
from hfgpt.errors import InputError
from hfgpt.tokenizer import train_tokenizer

TEXTS = list(generate_stories(100, 3))


@pytest.fixture(autouse=True)
def forget_tokenizers():
    yield
    load_gigatoken.cache_clear()


def write_random_texts(number):
    rng = random.Random(5)
    points = [*range(0x20, 0x300), *range(0x4E00, 0x4E20), *range(0x1F600, 0x1F620), 0x200D, 0xFEFF, 0x301]
    random_texts = ["".join(map(chr, rng.choices(points, k=rng.randint(0, 60)))) for _ in range(number)]
    pieces = [" ", "  ", "\n", "\r\n", "<|endoftext|>", "<|pad|>", "it's", "I'LL", "123", "é", "fox", ".", "\u00a0"]
    return random_texts + ["".join(rng.choices(pieces, k=rng.randint(1, 30))) for _ in range(number)] + TEXTS


def encode(texts, coder, append_eos=True):
    return coder.encode(texts, append_eos).column("input_ids").to_pylist()


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize("append_eos", [True, False])
def test_gigatoken_gives_the_same_tokens(monkeypatch, kind, append_eos):
    pytest.importorskip("gigatoken")
    coder = Encoding.of(train_tokenizer(TEXTS, kind, vocab_size=500))
    texts = write_random_texts(500)
    assert kind != "bpe" or load_gigatoken(coder.backend)
    found = encode(texts, coder, append_eos)
    load_gigatoken.cache_clear()
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # not installed
    assert load_gigatoken(coder.backend) is None
    assert found == encode(texts, coder, append_eos)


class WrongTokenizer:
    """Forgets the last token of texts that have a certain word."""

    def __init__(self, tokenizer, word):
        self.tokenizer, self.word = tokenizer, word

    def encode_batch(self, texts, parallel=None):
        import awkward

        rows = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return awkward.Array([row[:-1] if self.word in text else row for row, text in zip(rows, texts, strict=True)])


@pytest.mark.parametrize("word", ["e", "fox"])
def test_gigatoken_is_not_used_if_it_gives_other_tokens(monkeypatch, word):
    pytest.importorskip("awkward")
    coder = Encoding.of(train_tokenizer(TEXTS, vocab_size=500))
    expected = encode(TEXTS, coder)
    load_gigatoken.cache_clear()
    wrong = SimpleNamespace(Tokenizer=lambda tokenizer: WrongTokenizer(tokenizer, word))
    monkeypatch.setitem(sys.modules, "gigatoken", wrong)
    if word == "e":  # found before it is used
        assert load_gigatoken(coder.backend) is None
        assert encode(TEXTS, coder) == expected
    else:
        assert load_gigatoken(coder.backend)
        with pytest.raises(
            InputError, match=r"^gigatoken encodes a text that begins with 'the fox' wrongly: uninstall"
        ):
            encode(["the fox", *TEXTS], coder)


def test_little_of_a_long_text_is_also_encoded_by_the_slower_library(monkeypatch):
    pytest.importorskip("gigatoken")
    coder, text, again = Encoding.of(train_tokenizer(TEXTS, vocab_size=500)), "\n".join(TEXTS * 5), []
    assert load_gigatoken(coder.backend)
    assert len(text) > 300_000
    slow = encoding.load_backend(coder.backend)
    counting = SimpleNamespace(encode=lambda text, **options: again.append(text) or slow.encode(text, **options))
    monkeypatch.setattr(encoding, "load_backend", lambda backend: counting)
    encode([text], coder)
    assert 0 < sum(map(len, again)) < len(text) / 10


def test_special_tokens_that_are_encoded_as_text_are_left_to_tokenizers():
    tokenizer = train_tokenizer(TEXTS, vocab_size=500)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    (row,) = encode(["a<|endoftext|>b"], Encoding.of(tokenizer))
    assert row.count(tokenizer.eos_token_id) == 1
    assert encoding.load_backend(Encoding.of(tokenizer).backend).encode_special_tokens
