"""`hfgpt verify`: what it recognizes, and what it says of a copy that computes something else."""

import json
import random
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification
from hfgpt.commands.convert import export_model
from hfgpt.commands.verify import check_tokens, diagnose, verify
from hfgpt.errors import InputError
from hfgpt.known_answers import (
    compare_answers,
    compute_with,
    computed_in,
    fit_prompts,
    record_answers,
)
from hfgpt.models import hash_weights
from hfgpt.records import KnownAnswers
from hfgpt.tokenizer import train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and two kites fly above the red ball. "


def build(tiny_config, kind="bpe", pad=0, **fields):
    tokenizer = train_tokenizer([TEXT * 3], kind, vocab_size=300)
    torch.manual_seed(fields.get("num_labels", 0))
    config = tiny_config(
        vocab_size=len(tokenizer) + pad, max_position_embeddings=96, pad_token_id=tokenizer.pad_token_id, **fields
    )
    model = (HfGPTForSequenceClassification if "num_labels" in fields else HfGPTForCausalLM)(config).eval()
    model.requires_grad_(False)
    return model, tokenizer


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record_answers(model, tokenizer, hash_weights(folder)).write(folder)
    return str(folder)


@pytest.fixture(scope="module")
def language_model(tiny_config):
    return build(tiny_config)


@pytest.fixture(scope="module")
def classifier(tiny_config):
    return build(tiny_config, num_labels=3)


@pytest.mark.parametrize("kind", ["char", "bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize("classes", [0, 3])
def test_a_saved_model_is_recognized(kind, classes, tiny_config, tmp_path):
    path = save(*build(tiny_config, kind, **({"num_labels": classes} if classes else {})), tmp_path / "m")
    assert verify(path).startswith("verified: this is the model measured on 20")
    with pytest.raises(InputError, match=r"--precision is 'half'; it must be float32, float16, bfloat16$"):
        verify(path, precision="half")
    for precision in ("float16", "bfloat16"):
        assert f"({precision}, limit " in verify(path, precision=precision)


def test_known_answers_cover_the_context_and_say_how_sure_they_are(language_model):
    model, tokenizer = language_model
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    known = record_answers(model, tokenizer, None)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert len(known.answers) == 8
    assert len(known.answers["context"].ids) in (95, 96)
    assert tokenizer.eos_token_id in known.answers["special"].ids
    assert known.limits["float32"] < 1e-3 < known.limits["float16"] < known.limits["bfloat16"]
    with computed_in(model, torch.float64) as compute:
        for answer in known.answers.values():
            expected = torch.tensor(answer.log_probabilities, dtype=torch.float64)
            scores = compute(answer.ids, answer.positions)
            assert (scores.topk(10).values - expected).abs().max() < 1e-8
            for index, (token, gap) in enumerate(zip(answer.continuation, answer.gaps, strict=True)):
                ids = answer.ids + answer.continuation[:index]
                best = compute(ids, [len(ids) - 1])[0].topk(2)
                assert (best.indices[0], best.values[0] - best.values[1]) == (token, pytest.approx(gap, abs=1e-9))


@settings(deadline=None, max_examples=20)
@given(context=st.integers(1, 70))
def test_prompts_fit_every_context(context, language_model):
    model, tokenizer = language_model
    for name, text in fit_prompts(tokenizer, context, model.config.vocab_size).items():
        tokens = len(tokenizer(text)["input_ids"])
        assert 1 <= tokens <= (context if name == "context" else max(context - 16, 1))


def zero_a_block(model, draw):
    """A quarter of the rows of a matrix."""
    weight = draw.choice([weight for name, weight in model.named_parameters() if weight.ndim == 2])
    rows = weight.shape[0] // 4
    start = draw.randrange(0, weight.shape[0] - rows)
    weight.data = weight.data.clone()
    weight.data[start : start + rows] = 0


def exchange_layers(model, draw):
    layers = model.base_model.layers
    layers[0], layers[1] = layers[1], layers[0]


def round_weights(model, draw):
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()


def forward_with(model, **changes):
    """A function for the log-probabilities of a model with another mask or other positions."""

    def compute(ids, positions):
        arguments = {name: change(len(ids), model.config.max_position_embeddings) for name, change in changes.items()}
        logits = model(input_ids=torch.tensor([ids]), use_cache=False, **arguments).logits[0]
        return (logits[positions] if positions else logits).double().log_softmax(-1)

    return compute


def see_everything(length, context):
    return torch.zeros(1, 1, length, length)


def shift_positions(length, context):
    return (torch.arange(length) + 1).clamp(max=context - 1)[None]


def name_the_fault(kind, model, tokenizer, known, draw):
    """What `verify` says of a model with a fault."""
    copy = type(model)(model.config).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    same_weights, precision = True, "float32"
    if kind == "tokenizer":
        with pytest.raises(InputError) as caught:
            check_tokens(known, lambda text: {"input_ids": [i + 1 for i in tokenizer(text)["input_ids"]]}, "copy")
        return str(caught.value)
    if kind in CHANGES:
        CHANGES[kind](copy, draw)
        same_weights, compute = False, compute_with(copy)
    elif kind == "precision":
        compute = compute_with(copy.bfloat16())
    elif kind == "pooling":
        compute = lambda ids, positions: compute_with(copy)(ids[:1], positions)  # noqa: E731
    else:
        change = {"mask": {"attention_mask": see_everything}, "positions": {"position_ids": shift_positions}}[kind]
        compute = forward_with(copy, **change)
    limit = known.limits[precision]
    comparison = compare_answers(known, compute, limit)
    return diagnose(known, comparison, limit, same_weights) if comparison.prompt else "verified"


CHANGES = {"zeros": zero_a_block, "layers": exchange_layers, "rounded": round_weights}
WORDS = {
    **{"zeros": "weights", "layers": "weights", "rounded": "precision", "precision": "precision"},
    **{"tokenizer": "tokenizer", "mask": "mask", "positions": "positions", "pooling": "pooling"},
}


def test_faults_are_named(language_model, classifier):
    """200 seeded corruptions."""
    known = {id(pair): record_answers(*pair, None) for pair in (language_model, classifier)}
    missed = []
    for seed in range(200):
        draw = random.Random(seed)
        kind = draw.choice(list(WORDS))
        pair = classifier if kind == "pooling" or (kind != "mask" and draw.random() < 0.3) else language_model
        said = name_the_fault(kind, *pair, known[id(pair)], draw)
        if WORDS[kind] not in said:
            missed.append((seed, kind, said))
    assert len(missed) <= 1, missed


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_implementation_is_not_a_false_alarm(attention, language_model, classifier, tmp_path):
    for number, (model, tokenizer) in enumerate((language_model, classifier)):
        known = record_answers(model, tokenizer, None)
        model.save_pretrained(tmp_path / f"{number}")
        other = type(model).from_pretrained(tmp_path / f"{number}", attn_implementation=attention)
        assert compare_answers(known, compute_with(other), known.limits["float32"]).prompt is None


def test_a_long_prompt_is_not_computed_if_the_weights_are_those_that_were_measured(
    language_model, tmp_path, monkeypatch
):
    model, tokenizer = language_model
    path = save(model, tokenizer, tmp_path / "m")
    known = KnownAnswers.read(tmp_path / "m")
    monkeypatch.setattr("hfgpt.commands.verify.SHORT", 90)
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    embeddings = other.get_parameter("model.embed_positions.weight")
    embeddings.data[80:] = 0  # the other prompts have fewer tokens
    other.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"differs in its (weights or positions|mask.*); .* in the prompt 'context'$"):
        verify(path)
    replace(known, weights_sha256=hash_weights(tmp_path / "m")).write(tmp_path / "m")
    assert verify(path).startswith("verified: ")


def test_an_exported_model_is_recognized_and_a_changed_one_is_not(language_model, tmp_path):
    path = save(*language_model, tmp_path / "m")
    export_model(path, tmp_path / "gpt2")
    assert verify(str(tmp_path / "gpt2")).startswith("verified: ")
    config = json.loads((tmp_path / "gpt2/config.json").read_text())
    (tmp_path / "gpt2/config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}))
    with pytest.raises(InputError, match=r"differs in its computation, with the same weights: check config\.json"):
        verify(str(tmp_path / "gpt2"))
    answers = json.loads((tmp_path / "m/known_answers.json").read_text())
    answers["answers"]["words"]["ids"][2] += 1
    (tmp_path / "m/known_answers.json").write_text(json.dumps(answers))
    with pytest.raises(InputError, match=r"'.*m' differs in its tokenizer: token 2 of the prompt 'words' is \d+, and"):
        verify(path)
    (tmp_path / "m/known_answers.json").unlink()
    with pytest.raises(InputError, match=r"'.*m' does not have known_answers\.json, which hfgpt saves with every"):
        verify(path)


class Completions(BaseHTTPRequestHandler):
    """OpenAI's completions, computed by `server.model`."""

    def do_GET(self):
        self._send({"data": [{"id": "mine"}]})

    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, job["model"], job["temperature"]) == ("/v1/completions", "mine", 0)
        model, tokenizer = self.server.pair
        ids = tokenizer(job["prompt"])["input_ids"]
        logprobs, new = {"top_logprobs": []}, []
        for _ in range(job["max_tokens"]):
            scores = compute_with(model)(ids + new, [len(ids + new) - 1])[0]
            scores[ids + new] -= self.server.penalty if new else 0
            best = (scores + self.server.left_out).topk(job["logprobs"])
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            logprobs["top_logprobs"].append({tokenizer.decode([index]): score for index, score in pairs})
            new.append(int(best.indices[0]))
            if new[-1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(new, skip_special_tokens=True)
        choice = {"text": text, "logprobs": logprobs if self.server.has_logprobs else None}
        self._send({"choices": [choice], "usage": {"prompt_tokens": len(ids) + self.server.extra}})

    def _send(self, content):
        body = json.dumps(content).encode()
        self.send_response(200 if self.path.startswith("/v1/") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), Completions)
    server.has_logprobs, server.extra, server.penalty, server.left_out = True, 0, 0, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_is_verified_by_its_log_probabilities(language_model, classifier, server, tmp_path, tiny_config):
    path, url = save(*language_model, tmp_path / "m"), f"http://127.0.0.1:{server.server_port}/v1"
    server.pair = language_model
    assert verify(path, url).startswith("verified: this is the model measured on ")
    server.left_out = 0.1  # minus the log-probability of the ids that it never generates
    with pytest.raises(InputError, match=rf"^{url} differs in its weights or positions"):
        verify(path, url)
    padded, tokenizer = build(tiny_config, pad=20)
    server.pair = padded, tokenizer
    assert verify(save(*server.pair, tmp_path / "padded"), url).startswith("verified: ")
    server.left_out = 0

    rounded, tokenizer = build(tiny_config)
    round_weights(rounded, None)
    server.pair = rounded, tokenizer
    with pytest.raises(InputError, match=rf"^{url} differs in its precision or weights; the largest difference is "):
        verify(path, url)
    assert "(bfloat16, limit" in verify(path, url, "bfloat16")

    exchange_layers(rounded, None)
    with pytest.raises(InputError, match=rf"^{url} differs in its weights or positions; "):
        verify(path, url, "bfloat16")
    server.pair, server.penalty = language_model, 1e9  # on tokens of the prompt, as of generation, but the first
    with pytest.raises(InputError, match=rf"^{url} differs in its greedy continuation, though the first tokens agree"):
        verify(path, url)
    server.penalty, server.extra = 0, 1
    with pytest.raises(
        InputError, match=r"differs in its tokenizer: the prompt 'words' has \d+ tokens there, and had"
    ):
        verify(path, url)
    server.extra, server.has_logprobs = 0, False
    with pytest.raises(InputError, match=rf"^the server at {url} answered without log-probabilities: start it with"):
        verify(path, url)
    with pytest.raises(InputError, match=rf"^{url[:-3]}/models answered with status 404 .*: check the URL$"):
        verify(path, url[:-3])
    with pytest.raises(InputError, match=r"^no server answers at http://127\.0\.0\.1:9/v1 \(.*\): start it, or check"):
        verify(path, "http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match=r"^--against is 'ftp://x'; it must be the URL of a server"):
        verify(path, "ftp://x")
    server.has_logprobs = True
    ending, tokenizer = server.pair = build(tiny_config, tie_word_embeddings=False)
    answer = record_answers(ending, tokenizer, "").answers["words"]
    hidden = ending.model(torch.tensor([answer.ids + answer.continuation[:2]])).last_hidden_state[0, -1]
    ending.lm_head.weight[tokenizer.eos_token_id] = hidden  # by far the likeliest after two tokens
    known = record_answers(ending, tokenizer, "").answers["words"]
    assert tokenizer.eos_token_id in known.continuation[:-1]
    assert verify(save(*server.pair, tmp_path / "ending"), url).startswith("verified: ")
    classifying = save(*classifier, tmp_path / "c")
    with pytest.raises(InputError, match=r"^--against is for language models: a classifier has no completions$"):
        verify(classifying, url)


def test_damaged_known_answers_are_one_line(language_model, tmp_path):
    path = save(*language_model, tmp_path / "m")
    content = json.loads((tmp_path / "m" / KnownAnswers.FILE).read_text())
    wild = {"answers": {"words": content["answers"]["words"] | {"top_ids": [[99999] * 10] * 4}}}
    for change in (
        {"answers": 3},
        {"answers": {"words": {"text": "a"}}},
        {"limits": {"float32": "small"}},
        {"limits": {}},
        wild,
    ):
        (tmp_path / "m" / KnownAnswers.FILE).write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=r"known_answers\.json|known answers"):
            verify(path)
