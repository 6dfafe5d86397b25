"""Stage 1, text to tokens: train or load a tokenizer, as a `transformers` fast tokenizer.

Sources:
- char: every character is a token, as in nanoGPT's data/shakespeare_char.
- bpe: byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over bytes, as in GPT-2 (Radford et al. 2019).
- wordpiece: Schuster and Nakajima 2012; layout as in BERT (Devlin et al. 2019, arXiv:1810.04805).
- unigram: Kudo 2018, arXiv:1804.10959; spaces as in SentencePiece (arXiv:1808.06226).

Special tokens come first in a trained vocabulary: `<|endoftext|>` has id 0 (both bos and eos token), the padding token
id 1, and `<|unk|>`, for kinds that can encounter unknown characters, the next id. Encoding does not add special
tokens, and a special token written in the text is encoded as that token, as in GPT-2.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hfgpt.errors import InputError
from hfgpt.foreign_code import without_remote_code

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
UNKNOWN = "<|unk|>"

# Files to look for: a saved tokenizer, or GPT-2's two files with transformers' or OpenAI's names.
SAVED_FILES = ("tokenizer.json", "tokenizer_config.json")
GPT2_FILES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}

# The trainers of tokenizers allocate memory for vocab_size tokens, and abort the process if that fails. The largest
# published vocabulary has a million tokens (XLM-V, arXiv:2301.10472).
MOST_TOKENS = 2**22
# Texts are split into pieces for the trainer, whose memory grows with the longest piece, and whose time is quadratic
# for text without spaces. 2048 makes no difference for ordinary text.
PIECE_CHARACTERS = 2048


@dataclass
class TokenizerArguments:
    """The recipe's section `tokenizer`.

    Args:
        path: A Hub id, a folder, or GPT-2's vocab.json with merges.txt next to it; None: train a tokenizer.
        kind: Type of tokenizer to train. `bpe` and `char` are lossless; `wordpiece` does not preserve spaces.
        vocab_size: Upper bound of the trained vocabulary, special tokens included (ignored by `char`).
        max_train_characters: Characters of text to train on, which bounds the memory.
        pad_token: The padding token; None: no padding token, as in GPT-2's published layout.
    """

    path: str | None = None
    kind: Literal["char", "bpe", "wordpiece", "unigram"] = "bpe"
    vocab_size: int = 4096
    max_train_characters: int = 100_000_000
    pad_token: str | None = PADDING


def build_tokenizer(arguments: TokenizerArguments, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Loads the tokenizer that a recipe names, or trains the one it describes.

    Args:
        arguments: The recipe's section `tokenizer`.
        texts: The training documents; not read when `arguments.path` is set.

    Returns:
        The tokenizer; a model for it needs `len(tokenizer)` embeddings.

    Raises:
        InputError: See `load_tokenizer` and `train_tokenizer`.
    """
    if arguments.path is not None:
        return load_tokenizer(arguments.path, arguments.pad_token)
    return train_tokenizer(
        texts, arguments.kind, arguments.vocab_size, arguments.max_train_characters, arguments.pad_token
    )


def train_tokenizer(
    texts: Iterable[str],
    kind: str = "bpe",
    vocab_size: int = 4096,
    max_characters: int = 100_000_000,
    pad_token: str | None = PADDING,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer; the same texts always give the same tokenizer.

    Args:
        texts: Documents of any length, read once as a stream.
        kind: `char`, `bpe`, `wordpiece` or `unigram`.
        vocab_size: Maximum vocabulary size, including special tokens; ignored by `char`.
        max_characters: Reading stops after this many characters; the last document is truncated.
        pad_token: The padding token, or None for a tokenizer without one.

    Returns:
        The tokenizer; for `bpe` a `GPT2Tokenizer`, which all tools that support GPT-2 can load.

    Raises:
        InputError: There is no text, the text is not valid Unicode, an argument is out of range, or `vocab_size` is
            too small for the single characters (for `bpe`: 256 bytes) and special tokens.

    Example:
        >>> tokenizer = train_tokenizer(["To be, or not to be"], kind="char")
        >>> tokenizer.decode(tokenizer.encode("not to be"))
        'not to be'
    """
    if isinstance(texts, str):
        raise InputError("texts is a single string, which would be read one character at a time; pass a list: [text]")
    if kind not in _TRAINERS:
        raise InputError(f"tokenizer kind is {kind!r}; it must be one of {', '.join(_TRAINERS)}")
    if max_characters < 1:
        raise InputError(f"max_train_characters is {max_characters}; it must be at least 1")
    if vocab_size > MOST_TOKENS:
        raise InputError(f"vocab_size is {vocab_size:,}, the limit is {MOST_TOKENS:,}; lower it")
    if pad_token in (END_OF_TEXT, UNKNOWN, ""):
        raise InputError(f"pad_token {pad_token!r} cannot be the padding token; choose another, such as {PADDING}")

    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": pad_token}
    if kind != "bpe":
        names["unk_token"] = UNKNOWN
    specials = [token for token in dict.fromkeys(names.values()) if token is not None]
    pieces = _split_into_pieces(texts, max_characters)
    first = next(pieces, None)
    if first is None:
        raise InputError("there is no text to train a tokenizer on: check the data")
    backend = _TRAINERS[kind](itertools.chain([first], pieces), vocab_size, specials)
    if kind == "bpe":
        model = json.loads(backend.to_str())["model"]
        return _build_gpt2(model["vocab"], [tuple(merge) for merge in model["merges"]], **names)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def _split_into_pieces(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    """The texts up to `max_characters`; long ones are split before a space, to keep words intact."""
    left = max_characters
    for number, text in enumerate(texts, start=1):
        text = text[:left]
        left -= len(text)
        start = 0
        while start < len(text):
            end = start + PIECE_CHARACTERS
            if end < len(text):
                space = text.rfind(" ", start + 1, end)
                end = space if space > start else end
            piece = text[start:end]
            try:
                piece.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"document {number} is not valid Unicode: {error}; fix or remove it") from error
            yield piece
            start = end
        if left == 0:
            return


def _train_char(pieces: Iterable[str], vocab_size: int, specials: list[str]) -> Tokenizer:
    characters = sorted(set(itertools.chain.from_iterable(pieces)))
    # A BPE without merges gives one token per character.
    backend = Tokenizer(models.BPE(_number([*specials, *characters]), merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    return backend


def _train_bpe(pieces: Iterable[str], vocab_size: int, specials: list[str]) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _check_room("bpe", vocab_size, len(alphabet), specials)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    settings = {"special_tokens": specials, "initial_alphabet": alphabet, "min_frequency": 2, "show_progress": False}
    backend.train_from_iterator(pieces, trainers.BpeTrainer(vocab_size=vocab_size, **settings))
    return backend


def _train_wordpiece(pieces: Iterable[str], vocab_size: int, specials: list[str]) -> Tokenizer:
    # WordPieceTrainer numbers its "##x" in the order of a hash table, which differs between runs, and breaks ties by
    # number. A plain BPE over words with a marked start finds the same merges in a deterministic order.
    mark = "\ue000"
    normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    splitter = pre_tokenizers.BertPreTokenizer()
    counter = Tokenizer(models.BPE())
    counter.normalizer = normalizer
    counter.pre_tokenizer = pre_tokenizers.Sequence([splitter, pre_tokenizers.Metaspace(mark, "always")])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False)
    counter.train_from_iterator(pieces, trainer)
    found = sorted(set(counter.get_vocab()) - {mark}, key=counter.token_to_id)
    singles = [token for token in found if len(token) == 1]
    _check_room("wordpiece", vocab_size, 2 * len(singles), specials)
    merged = [token[1:] if token.startswith(mark) else f"##{token}" for token in found]
    vocab = _number([*specials, *singles, *(f"##{single}" for single in singles), *merged], vocab_size)

    backend = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN))
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return backend


def _train_unigram(pieces: Iterable[str], vocab_size: int, specials: list[str]) -> Tokenizer:
    alphabet = set()

    def checked_pieces() -> Iterator[str]:
        for piece in pieces:
            alphabet.update(piece.replace(" ", "▁"))
            yield piece
        # The alphabet is known at the end of the stream, before the slow part of the training.
        _check_room("unigram", vocab_size, len(alphabet), specials)

    backend = Tokenizer(models.Unigram())
    # A space belongs to the next word, and none is added at the start, so that decoding is lossless.
    spaces = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\n+"), "isolated"), spaces])
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    settings = {"special_tokens": specials, "unk_token": UNKNOWN, "show_progress": False}
    backend.train_from_iterator(checked_pieces(), trainers.UnigramTrainer(vocab_size=vocab_size, **settings))

    # The trainer always finds the same pieces, but sums in the order of a hash table (the last digits differ), and
    # gives characters it dropped the lowest score plus steps of 1e-4 in that order: equalize and round the scores.
    scores = {piece: score for piece, score in json.loads(backend.to_str())["model"]["vocab"] if piece not in specials}
    lowest = min(scores.values())
    for piece, score in scores.items():
        rare = piece in alphabet and score < lowest + 1e-4 * (len(alphabet) + 1)
        scores[piece] = round(lowest if rare else score, 4)
    # It also exceeds vocab_size if the alphabet alone fills it, so the least likely longer pieces are dropped here.
    ranked = sorted(scores, key=lambda piece: (piece not in alphabet, -scores[piece], piece))
    vocab = [(token, scores.get(token, 0.0)) for token in _number([*specials, *ranked], vocab_size)]
    backend.model = models.Unigram(vocab, unk_id=specials.index(UNKNOWN))
    return backend


_TRAINERS = {"char": _train_char, "bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}


def _number(tokens: Iterable[str], limit: int | None = None) -> dict[str, int]:
    """The first `limit` distinct tokens with their ids."""
    return {token: number for number, token in enumerate(itertools.islice(dict.fromkeys(tokens), limit))}


def _check_room(kind: str, vocab_size: int, singles: int, specials: list[str]) -> None:
    minimum = singles + len(specials)
    if vocab_size < minimum:
        raise InputError(
            f"vocab_size {vocab_size} is too small: {kind} needs at least {minimum} on this text, for {singles} "
            f"single characters or bytes and {len(specials)} special tokens; raise tokenizer.vocab_size"
        )


def _build_gpt2(vocab: dict[str, int], merges: list[tuple[str, str]], **names: str | None) -> GPT2Tokenizer:
    return GPT2Tokenizer(vocab, merges, clean_up_tokenization_spaces=False, **names)


def build_char_tokenizer(ids: dict[str, int]) -> PreTrainedTokenizerFast:
    """A tokenizer with exactly these characters and no special tokens, as for nanoGPT's datasets.

    Args:
        ids: Character -> id, from 0 without gaps.

    Returns:
        The tokenizer. It has no end-of-text token and no unknown token, so encoding an unknown character is an error
        of `tokenizers`.
    """
    # Not a BPE, which would silently drop unknown characters.
    backend = Tokenizer(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def load_tokenizer(
    path: str | os.PathLike, pad_token: str | None = PADDING, add_eos: bool = True
) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from the Hub, a folder, or GPT-2's two vocabulary files.

    A path that exists, starts with `.`, `/` or `~`, ends in `.json` or has two slashes is local and never looked up on
    the Hub.

    Args:
        path: A Hub id; a folder written by `save_pretrained`; or GPT-2's `vocab.json` (with `merges.txt` in the same
            folder), OpenAI's `encoder.json` (with `vocab.bpe`), or a folder with such a pair.
        pad_token: Padding token for a tokenizer that has none, or that pads with its end-of-text token (which could
            then not be learned). A new token gets the id `len(tokenizer)`, so the model needs one more embedding. None
            keeps the saved padding token.
        add_eos: Whether to add `<|endoftext|>` to a tokenizer without an end-of-text token, which also needs an
            embedding.

    Returns:
        The tokenizer.

    Raises:
        InputError: There is no tokenizer at `path`, it cannot be read, it is not a fast tokenizer, or `pad_token` is
            its end-of-text token.
    """
    location = Path(path).expanduser()
    looks_local = str(path).startswith((".", "/", "~")) or location.suffix == ".json" or str(path).count("/") > 1
    files = _find_files(location) if looks_local or location.exists() else None
    try:
        if files is None:
            tokenizer = read_tokenizer(str(path))
        elif len(files) == 1:
            tokenizer = read_tokenizer(str(files[0]))
        else:
            tokenizer = _build_gpt2(*models.BPE.read_file(*map(str, files)))
    except InputError:
        raise
    # The Rust library raises a bare Exception for a damaged file.
    except Exception as error:
        looked = "as a file, a folder or a Hub id" if files is None else "from its files: save it again"
        reason = " ".join(str(error).split())
        raise InputError(f"tokenizer {str(path)!r} cannot be loaded {looked} ({reason})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"tokenizer {str(path)!r} is a {type(tokenizer).__name__}; only fast tokenizers can be used")

    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers' result for a folder without its files
        raise InputError(f"tokenizer {str(path)!r} has only special tokens: its files are missing")

    if add_eos and tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    if pad_token is not None and tokenizer.pad_token in (None, tokenizer.eos_token):
        if pad_token == tokenizer.eos_token:
            raise InputError(f"pad_token {pad_token!r} is the end-of-text token of {path}; choose another, or None")
        tokenizer.add_special_tokens({"pad_token": pad_token})
    return tokenizer


def read_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer without running any code from its repository.

    Args:
        path: A folder or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: It needs third-party code, is not a tokenizer, or has a special token that is not in its
            vocabulary.
    """
    with without_remote_code(path):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # `tokenizer_class` may be the name of any class
        raise InputError(f"'{path}' is a {type(tokenizer).__name__}, not a tokenizer: fix its tokenizer_class")
    if not isinstance(tokenizer.model_max_length, int) or tokenizer.model_max_length < 1:
        raise InputError(
            f"the tokenizer of '{path}' has model_max_length {tokenizer.model_max_length!r}, which is not a positive "
            "integer: fix its tokenizer_config.json"
        )
    if lacking := [token for token in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(token) is None]:
        raise InputError(
            f"the tokenizer of '{path}' has the special token {lacking[0]!r}, which is not in its vocabulary: fix its "
            "tokenizer_config.json"
        )
    tokenizer.init_kwargs.pop("auto_map", None)  # would be saved again
    return tokenizer


def _find_files(location: Path) -> list[Path]:
    """The folder that transformers can load, or GPT-2's two files, at `location`."""
    folder, names = location.parent, [location.name]
    if location.is_dir():
        folder, names = location, [*SAVED_FILES, *GPT2_FILES]
    for name in names:
        merges = folder / GPT2_FILES.get(name, "merges.txt")
        if name in SAVED_FILES and (folder / name).is_file():
            return [folder]
        if name not in SAVED_FILES and (folder / name).is_file() and merges.is_file():
            return [folder / name, merges]
    pairs = ", ".join(f"{vocab} with {merges}" for vocab, merges in GPT2_FILES.items())
    raise InputError(
        f"no tokenizer at {location}: looked for {', '.join(SAVED_FILES)}, {pairs}; give one of them or their folder"
    )


def wrap_in_end_of_text(tokenizer: PreTrainedTokenizerFast):
    """Makes a tokenizer add its end-of-text token before and after every text, also after saving and loading.

    Args:
        tokenizer: Changed in place; `add_special_tokens=False` omits the two tokens.

    Raises:
        InputError: The tokenizer does not have an end-of-text token.
    """
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no end-of-text token to wrap texts in: unset data.end_of_text")
    end, index = tokenizer.eos_token, tokenizer.eos_token_id
    wrap = processors.TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, index)])
    tokenizer.backend_tokenizer.post_processor = wrap


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that determines the ids of a text or chat; unchanged by saving and loading.

    Args:
        tokenizer: Any fast tokenizer.

    Returns:
        64 hexadecimal digits. Includes the chat template, but not the truncation and padding of the last call.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(truncation=None, padding=None)
    state.update(special_tokens=tokenizer.special_tokens_map, chat_template=tokenizer.chat_template)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
