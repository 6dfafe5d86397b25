"""Damaged, malicious or wrong files: a one-line error, no code run, no files left behind. Checks are exact."""

import io
import os
import pickle
import random
import tarfile
import warnings
import zipfile

import pytest
import torch
from makers import HEADS, VOCAB, make_book_weights, make_gpt2, save_nanogpt
from rich.console import Console
from safetensors.torch import save_file

from hfgpt import InputError
from hfgpt.commands.convert import import_checkpoint
from hfgpt.conversion.checkpoints import read_checkpoint
from hfgpt.conversion.nanogpt import read_meta
from hfgpt.conversion.sources import ImportArguments

QUIET = Console(file=io.StringIO())


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refusal(source, folder, **arguments) -> str:
    """The error message of a refused import, which must leave the folder unchanged."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError) as error:
        import_checkpoint(str(source), folder / "out", ImportArguments(**{"num_heads": HEADS, **arguments}), QUIET)
    assert sorted(folder.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(change):
    weights = make_book_weights()
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": 1}, "is not a state dict: 'x' is a int, not a tensor; save model.state_dict()"),
        ({"model": {0: torch.ones(1)}}, "is not a state dict: 0 is a Tensor"),
        ({}, "contains no weights"),
        ([torch.ones(1)], "contains a list, not a state dict"),
        (torch.nn.Linear(2, 2), "contains code (torch.nn.modules.linear.Linear) and is not loaded"),
        (changed(lambda w: w.pop("final_norm.scale")), "the checkpoint lacks the weight model.norm.weight (1 in all)"),
        (changed(lambda w: w.pop("tok_emb.weight")), "has no matrix for model.embed_tokens.weight"),
        (changed(lambda w: w.update({"more.weight": torch.ones(1)})), "1 of 34 keys do not match it (more.weight)"),
        (changed(lambda w: w["pos_emb.weight"].fill_(torch.nan)), "pos_emb.weight has NaN or infinite values"),
        (changed(lambda w: w.update({"final_norm.scale": torch.ones(47)})), "model.norm.weight has (47,), but the"),
        (changed(lambda w: w.update({"out_head.weight": torch.ones(VOCAB, 47)})), "lm_head.weight has (90, 47), but"),
        (
            changed(lambda w: w.update({"final_norm.scale": torch.ones(48).to_sparse()})),
            "is not a dense tensor",
        ),
        (changed(lambda w: w.update({"final_norm.scale": torch.ones(48).long()})), "is stored as torch.int64"),
        (changed(lambda w: w.update({"_orig_mod.tok_emb.weight": torch.ones(1)})), "some weights twice"),
        (
            changed(lambda w: w.update({"out_head.bias": torch.ones(VOCAB)})),
            "the language model head has a bias",
        ),
        (
            {"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2), "model.norm.weight": torch.ones(2)},
            "2 of 2 keys do not match it (model.layers.0.self_attn.q_proj.weight, model.norm.weight)",
        ),
    ],
)
def test_what_is_not_a_gpt_checkpoint_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    assert message in refusal(tmp_path / "model.pt", tmp_path)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.ckpt"])
def test_code_in_a_pickle_is_reported_and_not_run(name, tmp_path):
    trap = tmp_path / "trap"
    torch.save({"model": {"wte.weight": Hostile(trap)}}, tmp_path / name)
    assert "contains code (posix.mkdir) and is not loaded" in refusal(tmp_path / name, tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Hostile(trap)))
    assert f"'{tmp_path / name}'" in refusal(tmp_path / name, tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        pickle.dumps(Hostile("trap")),
        pickle.dumps({"stoi": {"a": 0}}),
        pickle.dumps({"stoi": {"a": 0, "b": 2}, "itos": {0: "a", 2: "b"}}),
        pickle.dumps({"stoi": {"a": 0, "b": 1}, "itos": {0: "b", 1: "a"}}),
        pickle.dumps({"stoi": {"ab": 0}, "itos": {0: "ab"}}),
        pickle.dumps([1, 2]),
    ],
)
def test_an_invalid_character_table_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_nanogpt(tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(InputError, match="is not a nanoGPT character table"):
        read_meta(tmp_path / "meta.pkl")
    assert "is not a nanoGPT character table" in refusal(tmp_path, tmp_path)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": None}, "cannot infer the number of attention heads (hidden size 48): pass --num-heads"),
        ({"num_heads": 5}, "hidden size 48 is not divisible by 5 attention heads"),
        ({"num_heads": -2}, "hidden size 48 is not divisible by -2 attention heads"),
        ({"format": "nanogpt"}, "these are not the weights of a nanogpt model"),
        ({"vocab_size": VOCAB + 1}, "the vocabulary has 91 tokens, but the checkpoint has only 90"),
        ({"tokenizer": "/nowhere"}, "no tokenizer at /nowhere"),
        ({"hidden_act": "gleu"}, "hidden_act is 'gleu'"),
    ],
)
def test_options_must_match_the_checkpoint(arguments, message, tmp_path):
    torch.save(make_book_weights(), tmp_path / "model.pth")
    assert message in refusal(tmp_path / "model.pth", tmp_path, **arguments)


def test_a_tokenizer_with_more_tokens_than_embeddings(tmp_path):
    from hfgpt.tokenizer import train_tokenizer

    make_gpt2(vocab_size=10).save_pretrained(tmp_path / "gpt2")
    train_tokenizer(["more letters than ten"], "char").save_pretrained(tmp_path / "gpt2")
    assert "tokens, but the model has only 10 embeddings" in refusal(tmp_path / "gpt2", tmp_path, num_heads=None)


def test_missing_or_unsupported_sources_are_refused(tiny_config, tmp_path, monkeypatch):
    from hfgpt import HfGPTForCausalLM

    monkeypatch.chdir(tmp_path)
    assert refusal("none.pt", tmp_path) == "'none.pt' does not exist: check the path"
    (tmp_path / "empty").mkdir()
    assert "does not have a config.json" in refusal("./empty", tmp_path)
    (tmp_path / "a.txt").write_text("text")
    assert "unsupported file type '.txt' (supported: .pt, .pth" in refusal("a.txt", tmp_path)
    HfGPTForCausalLM(tiny_config()).save_pretrained(tmp_path / "ours")
    assert "is a model of type hfgpt; only models of type gpt2" in refusal("ours", tmp_path)
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    assert "in the format gpt2, not book" in refusal("gpt2", tmp_path, format="book")
    assert "--num-heads is already in the config.json" in refusal("gpt2", tmp_path)


def test_an_existing_folder_is_not_modified(tmp_path):
    torch.save(make_book_weights(), tmp_path / "model.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "already exists: choose a new folder" in refusal(tmp_path / "model.pth", tmp_path)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_file_from_before_torch_1_6_is_read(tmp_path):
    torch.save(make_book_weights(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    weights = read_checkpoint(tmp_path / "old.pth").weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in make_book_weights().items())


def test_a_newer_pickle_is_read_without_a_warning(tmp_path):
    torch.save(make_book_weights(), tmp_path / "new.pth", pickle_protocol=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_checkpoint(tmp_path / "new.pth").weights.keys() == make_book_weights().keys()


def test_a_flipped_bit_in_a_weight_is_detected_by_its_checksum(tmp_path):
    """Each flip is either detected or in bytes without meaning: padding, dates."""
    weights, path, generator = make_book_weights(), tmp_path / "model.pth", random.Random(0)
    torch.save(weights, path)
    content = path.read_bytes()
    start = content.index(weights["tok_emb.weight"].numpy().tobytes())
    for place in range(start, start + 20):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"\(checksum mismatch in model/data/\d+\): copy or save it again"):
            read_checkpoint(path)
    refused = 0
    for _ in range(40):
        place, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        try:
            read = read_checkpoint(path).weights
            assert all(torch.equal(tensor, read[name]) for name, tensor in weights.items())
        except InputError:
            refused += 1
    assert refused > 20


def test_an_archive_without_checksums_is_read_and_a_compressed_one_refused(tmp_path):
    weights, path = make_book_weights(), tmp_path / "model.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(path).weights.keys() == weights.keys()
    torch.save(weights, tmp_path / "other.pth")
    with zipfile.ZipFile(tmp_path / "other.pth") as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in archive.infolist():
            out.writestr(entry.filename, archive.read(entry))
    assert "(its tensors are compressed)" in refusal(path, tmp_path)


def test_formats_that_contain_programs_are_not_read(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    assert "(it is a TorchScript program)" in refusal(tmp_path / "program.pt", tmp_path)
    with tarfile.open(tmp_path / "model.pt", "w") as archive:  # as written by torch before 0.4
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    message = refusal(tmp_path / "model.pt", tmp_path)
    assert "(an old format that can contain code)" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("kind", ["nanogpt.pt", "book.pth", "old.pth", "book.safetensors", "meta.pkl", "gpt2"])
def test_damaged_files_give_a_one_line_error_or_a_model(kind, tmp_path):
    """40 files per kind, truncated or with bytes changed, many in the header: no traceback, no files left behind."""
    generator = random.Random(kind)
    source = tmp_path / ("model.pt" if kind in ("nanogpt.pt", "meta.pkl") else kind)
    damaged = source
    if kind in ("nanogpt.pt", "meta.pkl"):
        save_nanogpt(source, vocab_size=3)
        if kind == "meta.pkl":
            damaged = tmp_path / "meta.pkl"
            damaged.write_bytes(pickle.dumps({"stoi": {"a": 0, "b": 1, "c": 2}, "itos": {0: "a", 1: "b", 2: "c"}}))
    elif kind == "book.safetensors":
        save_file(make_book_weights(), source)
    elif kind == "gpt2":
        make_gpt2().save_pretrained(source)
        damaged = source / "model.safetensors"
    else:
        torch.save(make_book_weights(), source, _use_new_zipfile_serialization=kind != "old.pth")
    content = damaged.read_bytes()
    messages = []
    for attempt in range(40):
        mutated = bytearray(content)
        if attempt % 2:
            mutated = mutated[: generator.randrange(len(content))]
        else:
            for _ in range(generator.choice([1, 4, 30])):
                reach = generator.choice([len(content), min(len(content), 600)])
                mutated[generator.randrange(reach)] = generator.randrange(256)
        damaged.write_bytes(mutated)
        before = sorted(tmp_path.iterdir())
        heads = None if kind == "gpt2" else HEADS
        try:
            import_checkpoint(str(source), tmp_path / "out", ImportArguments(num_heads=heads), QUIET)
            for path in (tmp_path / "out").iterdir():
                path.unlink()
            (tmp_path / "out").rmdir()
        except InputError as error:
            messages.append(str(error))
        assert sorted(tmp_path.iterdir()) == before
    assert len(messages) >= 20, "half of them are truncated"
    assert not [message for message in messages if "\n" in message]
