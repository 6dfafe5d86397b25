"""Edge cases: tiny models, half and double precision, a missing bias, invalid tokenizers. Checks are exact."""

import io
import json
import pickle

import pytest
import torch
from makers import HEADS, VOCAB, NanoGPT, add_lora, make_book_weights, make_gpt2, randomize, save_nanogpt
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from hfgpt import HfGPTForCausalLM, InputError
from hfgpt.commands.convert import export_model, import_checkpoint
from hfgpt.conversion.nanogpt import read_meta
from hfgpt.conversion.sources import ImportArguments
from hfgpt.data.sources import DataArguments
from hfgpt.evaluation import EvaluationArguments
from hfgpt.models import find_model
from hfgpt.saving import check_free
from hfgpt.tasks import TASKS
from hfgpt.tokenizer import train_tokenizer

QUIET = Console(file=io.StringIO())


def convert(source, out, **arguments):
    return import_checkpoint(str(source), out, ImportArguments(**arguments), QUIET)


@pytest.mark.parametrize("context", [1, 2, 8])
def test_contexts_shorter_than_the_parity_report(context, tmp_path):
    model = randomize(NanoGPT(block_size=context))
    torch.save({"model": model.state_dict(), "model_args": {"n_head": HEADS}}, tmp_path / "ckpt.pt")
    assert convert(tmp_path, tmp_path / "out").greedy_equal
    make_gpt2(n_positions=context).save_pretrained(tmp_path / "gpt2")
    assert convert(tmp_path / "gpt2", tmp_path / "out2").greedy_equal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_kept_exactly(dtype, tmp_path):
    weights = {name: tensor.to(dtype) for name, tensor in make_book_weights().items()}
    if dtype == torch.float64:  # values that float32 cannot represent
        weights = {name: tensor + tensor.sign() * 1e-12 for name, tensor in weights.items()}
    torch.save(weights, tmp_path / "model.pth")
    assert convert(tmp_path / "model.pth", tmp_path / "out", num_heads=HEADS).passed
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved["model.layers.1.self_attn.k_proj.weight"], weights["trf_blocks.1.att.W_key.weight"])
    export_model(str(tmp_path / "out"), tmp_path / "gpt2", console=QUIET)
    exported = load_file(tmp_path / "gpt2" / "model.safetensors")
    assert torch.equal(exported["transformer.h.1.mlp.c_fc.weight"].T, weights["trf_blocks.1.ff.layers.0.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("change", ["lora", "classifier"])
def test_weights_recomputed_from_half_precision_are_float32(dtype, change, tmp_path):
    weights = add_lora(make_book_weights()) if change == "lora" else make_book_weights(classes=2)
    torch.save({name: tensor.to(dtype) for name, tensor in weights.items()}, tmp_path / "model.pth")
    scale = {"lora_scale": 0.5} if change == "lora" else {}
    assert convert(tmp_path / "model.pth", tmp_path / "out", num_heads=HEADS, **scale).passed
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.bias"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["nanogpt", "book", "gpt2"])
@pytest.mark.parametrize("place", ["block", "norm"])
def test_a_single_missing_bias_is_refused(kind, place, tmp_path):
    if kind == "book":
        weights = make_book_weights()
        missing = "trf_blocks.1.ff.layers.0.bias" if place == "block" else "final_norm.shift"
    else:
        weights = dict((randomize(NanoGPT()) if kind == "nanogpt" else make_gpt2()).state_dict())
        missing = f"transformer.{'h.1.mlp.c_fc.bias' if place == 'block' else 'ln_f.bias'}"
    del weights[missing]
    torch.save(weights, tmp_path / "model.pt")
    ours = "model.layers.1.mlp.up_proj.bias" if place == "block" else "model.norm.bias"
    with pytest.raises(InputError, match=rf"the checkpoint lacks the weight {ours} \(1 in all\)"):
        convert(tmp_path / "model.pt", tmp_path / "out", num_heads=HEADS)


def test_num_heads_that_contradicts_the_checkpoint_is_refused(tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="--num-heads is 2, but the checkpoint has 4: leave it out"):
        convert(tmp_path, tmp_path / "out", num_heads=2)


@pytest.mark.parametrize("kind", ["nanogpt", "book"])
def test_a_tied_head_that_was_saved_once(kind, tmp_path):
    weights = make_book_weights(tied=True) if kind == "book" else dict(randomize(NanoGPT()).state_dict())
    del weights["out_head.weight" if kind == "book" else "lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", tmp_path / "out", num_heads=HEADS)
    assert report.parameters == report.source_parameters


def test_a_head_of_another_size_is_a_classifier_only_in_the_book(tmp_path):
    weights = dict(randomize(NanoGPT()).state_dict()) | {"lm_head.weight": torch.ones(VOCAB - 1, 48)}
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"lm_head\.weight has \(89, 48\)"):
        convert(tmp_path / "model.pt", tmp_path / "out", num_heads=HEADS)


@pytest.mark.parametrize(
    "change",
    [
        {"out_head.bias": torch.ones(3)},
        {"out_head.weight": torch.ones(2, 47)},
        {"out_head.weight": torch.ones(2)},
        {"final_norm.shift": torch.ones(47)},
    ],
)
def test_an_inconsistent_classifier_is_refused(change, tmp_path):
    torch.save(make_book_weights(classes=2) | change, tmp_path / "model.pth")
    with pytest.raises(InputError, match="inconsistent shapes"):
        convert(tmp_path / "model.pth", tmp_path / "out", num_heads=HEADS)


def test_tensors_larger_than_the_file_are_refused(tmp_path):
    weights = make_book_weights() | {"out_head.weight": torch.zeros(1).expand(10**7, 10**7)}
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(InputError, match=r"out_head\.weight is not a dense tensor"):
        convert(tmp_path / "model.pth", tmp_path / "out", num_heads=HEADS)
    # A memo index of 2^26; the C unpickler would allocate a table of that size.
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x02Nr\x00\x00\x00\x04.")
    with pytest.raises(InputError, match="is not a nanoGPT character table"):
        read_meta(tmp_path / "meta.pkl")


def test_gaps_in_block_numbers_are_refused(tmp_path):
    weights = {name.replace("trf_blocks.1.", "trf_blocks.99999999."): w for name, w in make_book_weights().items()}
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(InputError, match=r"not numbered from 0 without gaps: \[0, 99999999\]"):
        convert(tmp_path / "model.pth", tmp_path / "out", num_heads=HEADS)


def test_an_unrelated_tokenizer_in_the_folder_is_refused(tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=300)
    train_tokenizer(["few letters"], "char").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 11 tokens, but the checkpoint has 300 embeddings"):
        convert(tmp_path, tmp_path / "out")
    report = convert(tmp_path, tmp_path / "out", tokenizer=str(tmp_path))
    assert f"tokenizer: 11 tokens, {tmp_path.name}" in report.notes, (
        "the report is published: it contains no local path"
    )


def test_a_tokenizer_config_without_vocabulary_is_not_a_tokenizer(tmp_path):
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    report = convert(tmp_path / "gpt2", tmp_path / "out")
    assert any(note.startswith("no tokenizer") for note in report.notes)
    with pytest.raises(InputError, match="has only special tokens"):
        convert(tmp_path / "gpt2", tmp_path / "out2", tokenizer=str(tmp_path / "gpt2"))


def test_a_character_table_without_end_of_text_is_kept(tmp_path):
    letters = sorted("abcdefgh ")
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=len(letters))
    tables = {"stoi": {c: i for i, c in enumerate(letters)}, "itos": dict(enumerate(letters))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(tables))
    convert(tmp_path, tmp_path / "out")
    export_model(str(tmp_path / "out"), tmp_path / "gpt2", console=QUIET)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "gpt2")) == len(letters)
    (tmp_path / "good.txt").write_text("a bad cafe gag " * 9)
    (tmp_path / "bad.txt").write_text("a snowman " * 9)
    data = DataArguments(path=str(tmp_path / "good.txt"), cache_dir=str(tmp_path / "cache"))
    model, evaluate = find_model(str(tmp_path / "gpt2")), TASKS["pretrain"].evaluate
    assert evaluate(model, data, EvaluationArguments())["eval_tokens"] == 15 * 9 - 1
    data = DataArguments(path=str(tmp_path / "bad.txt"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="the tokenizer cannot encode all of the text"):
        evaluate(model, data, EvaluationArguments())


def test_old_gpt2_files(tmp_path):
    native = make_gpt2()
    native.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_ctx": 7, "_num_labels": 2}))
    assert HfGPTForCausalLM.from_pretrained(tmp_path).config.max_position_embeddings == 40
    with pytest.raises(InputError, match="import the folder"):
        convert(tmp_path / "model.safetensors", tmp_path / "out", num_heads=HEADS)


def test_invalid_output_paths_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, message in (
        ("file/out", "is not a directory"),
        ("link", "exists"),
        ("new/..", "exists"),
        ("file", "exists"),
    ):
        with pytest.raises(InputError, match=message):
            check_free(tmp_path / path)
    assert check_free(tmp_path / "new" / ".." / "other") == tmp_path / "other"


def test_brackets_in_a_path_are_not_markup(tmp_path):
    folder = tmp_path / "run[1]" / "x[" / "b]"
    folder.mkdir(parents=True)
    save_nanogpt(folder / "ckpt.pt")
    shown = io.StringIO()
    import_checkpoint(str(folder), tmp_path / "out", ImportArguments(), Console(file=shown, width=500))
    assert shown.getvalue().startswith(f"{folder} (nanogpt)")


@pytest.mark.parametrize("native", [True, False])
def test_an_adapter_of_gpt2(native, tmp_path):
    """Trained on our GPT-2 it can be exported; trained on transformers' GPT-2 it matches none of our modules."""
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    base = (GPT2LMHeadModel if native else HfGPTForCausalLM).from_pretrained(tmp_path / "gpt2")
    settings = LoraConfig(
        r=2, target_modules=["c_attn" if native else "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    if native:
        with pytest.raises(InputError, match=r"cannot be loaded onto its base model \(Target modules"):
            export_model(str(tmp_path / "adapter"), tmp_path / "out", merge_adapter=True, console=QUIET)
        return
    export_model(str(tmp_path / "adapter"), tmp_path / "out", merge_adapter=True, console=QUIET)
    ids = torch.arange(3, 23)[None]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        # There the update is merged into the matrix, so logits of about 10 are rounded differently.
        torch.testing.assert_close(exported(ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
