"""Every kind of tokenizer: training is deterministic, texts round-trip, and it loads where hfgpt is not installed.

All comparisons are exact: ids, texts and hashes have no tolerance.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from hfgpt import tokenizer as module
from hfgpt.errors import InputError
from hfgpt.tokenizer import TokenizerArguments, build_tokenizer, load_tokenizer, tokenizer_hash, train_tokenizer

KINDS = ["char", "bpe", "wordpiece", "unigram"]
SYLLABLES = ["ka", "lo", "mi", "ne", "ru", "sho", "ti", "va", "wen", "xy"]
SAMPLE = "Karumi shonelo, vaxy?\n\nTiwen <|endoftext|> lone  miru <|pad|>.\n"


def make_corpus(seed: int = 0) -> list[str]:
    """Documents of random words: many counts tie, which would expose an unstable trainer."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=30)).capitalize() + draw.choice(".?!,") + "\n\nA\n" for _ in range(60)]


@pytest.fixture(scope="module")
def trained() -> dict[str, PreTrainedTokenizerFast]:
    return {kind: train_tokenizer(make_corpus(), kind, vocab_size=400) for kind in KINDS}


@pytest.fixture(scope="module")
def gpt2_files(trained, tmp_path_factory) -> Path:
    """A folder with only GPT-2's two files, from the trained bpe tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    trained["bpe"].backend_tokenizer.model.save(str(folder))
    assert sorted(file.name for file in folder.iterdir()) == ["merges.txt", "vocab.json"]
    return folder


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_come_first(kind, trained):
    tokenizer = trained[kind]
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|pad|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert tokenizer.unk_token_id == (0 if kind == "bpe" else 2)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert tokenizer.clean_up_tokenization_spaces is False
    # Ids are 0 ... len - 1 without gaps, so len(tokenizer) is the number of embeddings.
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    # The corpus is large enough for 400 bpe tokens, fewer for the other kinds.
    assert len(tokenizer) == 400 if kind == "bpe" else len(tokenizer) < 400

    # Encoding adds no special tokens; a special token written in the text becomes that token.
    ids = tokenizer.encode(SAMPLE)
    assert ids == tokenizer.encode(SAMPLE, add_special_tokens=False)
    assert ids.count(0) == ids.count(1) == 1
    assert ids[0] > 1


@pytest.mark.parametrize("kind", KINDS)
def test_without_padding_token(kind):
    tokenizer = train_tokenizer(make_corpus(), kind, vocab_size=400, pad_token=None)
    assert tokenizer.pad_token is None
    assert "<|pad|>" not in tokenizer.get_vocab()
    assert tokenizer.unk_token_id == (0 if kind == "bpe" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(kind, trained):
    # Each training draws new hash seeds, as a new process does.
    again = [train_tokenizer(make_corpus(), kind, vocab_size=400) for _ in range(3)]
    expected = trained[kind].backend_tokenizer.to_str()
    assert all(tokenizer.backend_tokenizer.to_str() == expected for tokenizer in again)
    assert {tokenizer_hash(tokenizer) for tokenizer in again} == {tokenizer_hash(trained[kind])}


def test_char_is_sorted_by_code_point():
    tokenizer = train_tokenizer(["hello\n", "a→b Z"], "char", vocab_size=2)
    assert tokenizer.convert_ids_to_tokens(range(3, len(tokenizer))) == sorted(set("hello\na→b Z"))
    assert tokenizer.decode(tokenizer.encode("Zab\n hell→")) == "Zab\n hell→"
    assert tokenizer.encode("hq🙂e") == [9, tokenizer.unk_token_id, tokenizer.unk_token_id, 8]


def test_wordpiece_marks_continuations():
    tokenizer = train_tokenizer(make_corpus(), "wordpiece", vocab_size=120)
    tokens = tokenizer.tokenize("kashoti wenqen")
    assert tokens[-1] == "<|unk|>"  # q is not in the text; one unknown character makes the whole word unknown
    assert not tokens[0].startswith("##")
    assert len(tokens) > 2
    assert all(token.startswith("##") for token in tokens[1:-1])
    assert tokenizer.decode(tokenizer.encode("kashoti lomi, ru.")) == "kashoti lomi, ru."
    # Every character is known at the start of a word and within it.
    singles = {token for token in tokenizer.get_vocab() if len(token) == 1}
    assert singles == set("".join(make_corpus())) - {" ", "\n"}
    assert all(f"##{single}" in tokenizer.get_vocab() for single in singles)


@pytest.mark.parametrize(
    ("kind", "minimum"),
    # bpe: 256 bytes + 2; the others: 3 special tokens and the characters "a b . \n" (wordpiece: "a b ." twice).
    [("bpe", 258), ("wordpiece", 9), ("unigram", 8)],
)
def test_smallest_vocabulary(kind, minimum):
    texts = ["ab ab.\n"] * 20
    tokenizer = train_tokenizer(texts, kind, vocab_size=minimum)
    assert len(tokenizer) == minimum
    with pytest.raises(InputError, match=rf"vocab_size {minimum - 1} .* at least {minimum} .* raise"):
        train_tokenizer(texts, kind, vocab_size=minimum - 1)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_largest_vocabulary(kind):
    """Beyond it, the trainers raise an OverflowError or abort the process."""
    assert len(train_tokenizer(["ab ab.\n"] * 20, kind, vocab_size=2**22)) < 300
    with pytest.raises(InputError, match=r"vocab_size is 4,194,305, the limit is 4,194,304; lower it"):
        train_tokenizer(["ab"], kind, vocab_size=2**22 + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a", "\n", "  ", "hello", "ab" * 50])
def test_tiny_texts_can_be_used_for_training(kind, text):
    tokenizer = train_tokenizer([text], kind, vocab_size=300)
    assert len(tokenizer) <= 300
    if kind != "wordpiece":
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_one_large_text(kind):
    text = " ".join(make_corpus()) * 4
    large = text * (1_000_000 // len(text) + 1) if kind == "bpe" else text
    assert large.isascii()
    tokenizer = train_tokenizer([large], kind, vocab_size=300)
    assert len(tokenizer) == 300 if kind in ("bpe", "wordpiece") else 3 + len(set(text)) <= len(tokenizer) <= 300


def test_reading_stops_at_the_limit():
    # An endless stream: this only returns if the texts are read lazily and reading stops at the limit.
    read = []
    texts = (read.append(number) or "abc def " for number in itertools.count())
    tokenizer = train_tokenizer(texts, "char", max_characters=20)
    assert read == [0, 1, 2]
    assert len(tokenizer) == 3 + len(set("abc def "))
    assert "z" not in train_tokenizer(["ab", "cdz"], "char", max_characters=4).get_vocab()


def test_pieces_join_to_the_text_without_splitting_words():
    texts = ["", " ".join(make_corpus()), "x" * 5000, "short"]
    pieces = list(module._split_into_pieces(texts, 10**9))
    assert "".join(pieces) == "".join(texts)
    assert max(map(len, pieces)) == module.PIECE_CHARACTERS
    words = [word for text in texts for word in text.split() if "xxx" not in word]
    assert [word for piece in pieces for word in piece.split() if "xxx" not in word] == words


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no text"),
        (["", ""], {}, "no text"),
        ("abc", {}, r"pass a list: \[text\]"),
        (["abc"], {"kind": "words"}, "tokenizer kind is 'words'; it must be one of char, bpe, wordpiece, unigram"),
        (["abc"], {"max_characters": 0}, "it must be at least 1"),
        (["abc"], {"pad_token": "<|endoftext|>"}, "cannot be the padding token"),
        (["ok", "a\ud800b"], {}, "document 2 is not valid Unicode"),
        (["a\ud800b"], {"kind": "char"}, "not valid Unicode"),
    ],
)
def test_training_errors(texts, options, message):
    with pytest.raises(InputError, match=message) as caught:
        train_tokenizer(texts, **options)
    assert "\n" not in str(caught.value)


# Round trips

SPECIAL_STRINGS = st.sampled_from(["<|endoftext|>", "<|pad|>", "<|unk|>", "<|", "|>", " ", "\n", "\r\n", "é", " ."])


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(st.text(), SPECIAL_STRINGS)))
@example(
    parts=[
        "\u200b\u200d\ufeff",
        "e\u0301",
        "👩‍👩‍👧‍👦",
        "\x00\x1f",
        " ,  .\t\n\n ",
        "don 't",
        "▁Ġ",
        "<|endo<|pad|>ftext|>",
    ]
)
def test_bpe_round_trips_any_text(trained, parts):
    text, tokenizer = "".join(parts), trained["bpe"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == re.sub(r"<\|endoftext\|>|<\|pad\|>", "", text)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["char", "unigram"])
def test_known_characters_round_trip(trained, kind, data):
    known = sorted(set("".join(make_corpus())))
    text = "".join(data.draw(st.lists(st.one_of(st.text(known), st.sampled_from(["<|pad|>", "<|endoftext|>"])))))
    tokenizer = trained[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    expected = re.sub(r"<\|endoftext\|>|<\|pad\|>", "", text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == expected


# Saving and loading

PLAIN_PROCESS = """
import json, sys
import transformers
folders, sample = json.loads(sys.argv[1])
for folder, quiet in folders:
    # A model's config.json of an unregistered model_type makes transformers warn, whatever the tokenizer is.
    if quiet:
        transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    print(json.dumps([tokenizer.encode(sample), tokenizer.special_tokens_map, len(tokenizer),
                      tokenizer.model_max_length, type(tokenizer).__name__]))
assert "hfgpt" not in sys.modules
"""


def test_loads_in_a_process_without_hfgpt(trained, tmp_path):
    folders, expected = [], []
    for kind, with_config in itertools.product(KINDS, [False, True]):
        folder = tmp_path / f"{kind}-{with_config}"
        tokenizer = load_tokenizer_copy(trained[kind], folder, model_max_length=64)
        if with_config:
            (folder / "config.json").write_text(json.dumps({"model_type": "hfgpt", "vocab_size": len(tokenizer)}))
        written = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
        assert written == ("GPT2Tokenizer" if kind == "bpe" else "TokenizersBackend")
        folders.append([str(folder), with_config])
        expected.append([tokenizer.encode(SAMPLE), tokenizer.special_tokens_map, len(tokenizer), 64, written])
    folders, expected = zip(*sorted(zip(folders, expected, strict=True), key=lambda pair: pair[0][1]), strict=True)

    # A minimal environment in another folder: hfgpt is not importable by accident, and there is no network.
    run = subprocess.run(
        [sys.executable, "-c", PLAIN_PROCESS, json.dumps([folders, SAMPLE])],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr == ""
    assert [json.loads(line) for line in run.stdout.splitlines()] == list(expected)


def load_tokenizer_copy(tokenizer: PreTrainedTokenizerFast, folder: Path, **changes) -> PreTrainedTokenizerFast:
    """Save a tokenizer and load it again, with attributes changed in between."""
    tokenizer.save_pretrained(folder)
    copy = AutoTokenizer.from_pretrained(folder)
    for name, value in changes.items():
        setattr(copy, name, value)
    copy.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_hash_is_unchanged_by_saving(kind, trained, tmp_path):
    tokenizer = load_tokenizer_copy(trained[kind], tmp_path / "plain")
    assert tokenizer_hash(tokenizer) == tokenizer_hash(trained[kind])

    tokenizer("some text", truncation=True, max_length=2, padding="max_length")
    assert tokenizer_hash(tokenizer) == tokenizer_hash(trained[kind])

    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}\n"
    changed = load_tokenizer_copy(tokenizer, tmp_path / "changed")
    assert changed.encode("ka<|user|>lo") == tokenizer.encode("ka<|user|>lo")
    assert tokenizer_hash(changed) == tokenizer_hash(tokenizer) != tokenizer_hash(trained[kind])
    changed.chat_template = "{{ messages[0]['content'] }}"
    assert tokenizer_hash(changed) != tokenizer_hash(tokenizer)


def test_hash_distinguishes_tokenizers(trained):
    others = [
        train_tokenizer(make_corpus(1), vocab_size=400),
        train_tokenizer(make_corpus(), vocab_size=400, pad_token=None),
    ]
    hashes = {tokenizer_hash(tokenizer) for tokenizer in [*trained.values(), *others]}
    assert len(hashes) == len(KINDS) + 2
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)


@pytest.mark.parametrize(
    "names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("my.json", "merges.txt")]
)
def test_gpt2_files(names, trained, gpt2_files, tmp_path):
    for name, source in zip(names, ["vocab.json", "merges.txt"], strict=True):
        (tmp_path / name).write_bytes((gpt2_files / source).read_bytes())
    locations = [tmp_path / names[0]] if names[0] == "my.json" else [tmp_path / names[0], tmp_path]
    for location in locations:
        tokenizer = load_tokenizer(location)
        assert isinstance(tokenizer, GPT2Tokenizer)
        # <|pad|> is already in the vocabulary and keeps its id.
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
        assert tokenizer.encode(SAMPLE) == trained["bpe"].encode(SAMPLE)
        assert tokenizer_hash(tokenizer) == tokenizer_hash(trained["bpe"])


def test_padding_token_of_a_loaded_tokenizer(trained, tmp_path):
    bare = train_tokenizer(make_corpus(), vocab_size=400, pad_token=None)
    bare.save_pretrained(tmp_path / "bare")
    assert load_tokenizer(tmp_path / "bare", pad_token=None).pad_token is None
    padded = load_tokenizer(tmp_path / "bare")
    assert (padded.pad_token, padded.pad_token_id, len(padded)) == ("<|pad|>", 400, 401)
    assert tokenizer_hash(load_tokenizer_copy(padded, tmp_path / "again")) == tokenizer_hash(padded)

    bare.pad_token = bare.eos_token
    bare.save_pretrained(tmp_path / "eos")
    assert load_tokenizer(tmp_path / "eos", pad_token="[PAD]").pad_token_id == 400
    assert load_tokenizer(tmp_path / "eos", pad_token=None).pad_token_id == 0
    with pytest.raises(InputError, match="is the end-of-text token"):
        load_tokenizer(tmp_path / "eos", pad_token="<|endoftext|>")

    # An existing padding token is kept.
    trained["bpe"].save_pretrained(tmp_path / "own")
    assert load_tokenizer(tmp_path / "own", pad_token="[PAD]").pad_token == "<|pad|>"


def test_end_of_text_is_added_where_missing(trained, tmp_path):
    backend = trained["char"].backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_token_id == 0
    # A tokenizer.json alone is enough, given as a file or by its folder.
    (tmp_path / "tokenizer_config.json").unlink()
    for location in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(location)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
        assert tokenizer.encode("kalo") == trained["char"].encode("kalo")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "runs/a/b", "vocab.json", "{tmp}"])
def test_missing_local_path_is_not_looked_up_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *_: pytest.fail("requested a local path from the Hub")
    )
    with pytest.raises(InputError, match=r"looked for tokenizer\.json.*vocab\.json with merges\.txt.*vocab\.bpe"):
        load_tokenizer(path.format(tmp=tmp_path))


def test_hub_ids(trained, monkeypatch):
    found = {"me/tiny": trained["bpe"], "me/slow": ByT5Tokenizer(), "me/model": 1}
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: found[name])
    assert load_tokenizer("me/tiny") is trained["bpe"]
    with pytest.raises(InputError, match="only fast tokenizers"):
        load_tokenizer("me/slow")
    with pytest.raises(InputError, match="'me/model' is a int, not a tokenizer"):
        load_tokenizer("me/model")

    def refuse(name, **options):
        raise OSError("not a\nrepository")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(InputError, match=r"'me/none' cannot be loaded .* a Hub id \(not a repository\)"):
        load_tokenizer("me/none")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_damaged_files(name, trained, gpt2_files, tmp_path):
    trained["bpe"].save_pretrained(tmp_path)
    for file in gpt2_files.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text('{"cut')
    with pytest.raises(InputError, match="cannot be loaded from its files") as caught:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_build_tokenizer(trained, tmp_path):
    built = build_tokenizer(TokenizerArguments(vocab_size=400), make_corpus())
    assert tokenizer_hash(built) == tokenizer_hash(trained["bpe"])
    arguments = TokenizerArguments(kind="char", max_train_characters=3, pad_token=None)
    assert len(build_tokenizer(arguments, ["abcdef"])) == 2 + 3

    built.save_pretrained(tmp_path)
    unread = (pytest.fail("read the texts") for _ in range(1))
    assert tokenizer_hash(build_tokenizer(TokenizerArguments(path=str(tmp_path)), unread)) == tokenizer_hash(built)


# The original GPT-2 vocabulary


@pytest.mark.skipif(
    "HFGPT_GPT2_TOKENIZER" not in os.environ,
    reason="needs GPT-2's vocab.json and merges.txt: set HFGPT_GPT2_TOKENIZER to their folder",
)
def test_gpt2_golden_ids():
    tokenizer = load_tokenizer(os.environ["HFGPT_GPT2_TOKENIZER"], pad_token=None)
    golden = {
        "Hello, I am": [15496, 11, 314, 716],
        "Hello, world. Is this-- a test?": [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30],
        "Hello, do you like tea? <|endoftext|> In the sunlit terracesof someunknownPlace.": [
            *[15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554],
            *[262, 4252, 18250, 8812, 2114, 1659, 617, 34680, 27271, 13],
        ],
        "<|user|>": [27, 91, 7220, 91, 29],
    }
    for text, ids in golden.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token) == (50257, 50256, None)
    assert load_tokenizer(os.environ["HFGPT_GPT2_TOKENIZER"]).pad_token_id == 50257

    verdict = Path(os.environ["HFGPT_GPT2_TOKENIZER"]).parent / "the-verdict.txt"
    if verdict.is_file():
        text = verdict.read_text(encoding="utf-8")
        cut = int(0.9 * len(text))
        lengths = [len(tokenizer.encode(part)) for part in (text, text[:cut], text[cut:])]
        assert lengths == [5145, 4612, 534]
