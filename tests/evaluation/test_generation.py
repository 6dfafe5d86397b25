"""Generation from one prompt: reproducible, greedy on request, and a clear error where it is impossible."""

import io
import math

import pytest
import torch
from transformers import TextStreamer

from hfgpt.errors import InputError
from hfgpt.evaluation.generation import SamplingArguments, TerminalStreamer, generate_texts
from hfgpt.modeling_hfgpt import HfGPTForCausalLM
from hfgpt.tokenizer import train_tokenizer

CONTEXT = 32


@pytest.fixture(scope="module")
def tokenizer():
    """Id 0 is end of text, 1 padding, 2 unknown; then the characters."""
    return train_tokenizer(["the quick brown fox jumps over the lazy dog"], kind="char")


@pytest.fixture(scope="module")
def make_model(tokenizer, tiny_config):
    def build(**fields) -> HfGPTForCausalLM:
        torch.manual_seed(0)
        config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **fields)
        assert (config.eos_token_id, config.bos_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
        model = HfGPTForCausalLM(config).eval()
        # A model with random weights ends texts at once; here only characters are likely.
        model.generation_config.suppress_tokens = [0, 1, 2]
        return model

    return build


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


def continue_greedily(model, tokenizer, ids: list[int], new: int) -> str:
    for _ in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        logits[[0, 1, 2]] = -math.inf
        ids = [*ids, int(logits.argmax())]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_greedy_takes_the_most_likely_token(model, tokenizer):
    prompt = "the fox"
    (text,) = generate_texts(model, tokenizer, prompt, SamplingArguments(max_new_tokens=20, greedy=True))
    assert text == continue_greedily(model, tokenizer, tokenizer(prompt)["input_ids"], 20)
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + 20
    # Sampling from one token, or with a temperature close to 0, gives the same.
    for options in ({"top_k": 1}, {"top_p": 1e-6, "top_k": 0}, {"temperature": 1e-4}):
        assert generate_texts(model, tokenizer, prompt, SamplingArguments(20, **options)) == [text]


def test_the_seed_determines_the_text(model, tokenizer):
    texts = [
        generate_texts(model, tokenizer, "the ", SamplingArguments(20, temperature=1.5, top_k=0, seed=seed))[0]
        for seed in (0, 0, 1, 2)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    # Independent of earlier draws.
    torch.rand(7)
    assert generate_texts(model, tokenizer, "the ", SamplingArguments(20, temperature=1.5, top_k=0))[0] == texts[0]


def test_several_samples(model, tokenizer):
    arguments = SamplingArguments(12, temperature=1.5, top_k=0, num_samples=4)
    texts = generate_texts(model, tokenizer, "the ", arguments)
    assert len(texts) == len(set(texts)) == 4
    assert all(text.startswith("the ") and len(text) == 4 + 12 for text in texts)
    assert generate_texts(model, tokenizer, "the ", arguments) == texts


def test_an_empty_prompt_starts_a_document(model, tokenizer):
    (text,) = generate_texts(model, tokenizer, "", SamplingArguments(10, greedy=True))
    assert text == continue_greedily(model, tokenizer, [tokenizer.eos_token_id], 10)
    assert len(text) == 10


def test_end_of_text_ends_generation(make_model, tokenizer):
    model = make_model(tie_word_embeddings=False)
    model.generation_config.suppress_tokens = None
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens equally likely: the first, end of text, is taken
    assert generate_texts(model, tokenizer, "the", SamplingArguments(20, greedy=True)) == ["the"]


def test_the_context_is_the_limit(model, tokenizer):
    prompt = "the quick " * 2
    fits = CONTEXT - len(prompt)
    (text,) = generate_texts(model, tokenizer, prompt, SamplingArguments(fits, greedy=True))
    assert len(text) == CONTEXT
    with pytest.raises(
        InputError, match=rf"has 20 tokens, .* 13 new tokens exceeds the context of 32: request at most {fits} new"
    ):
        generate_texts(model, tokenizer, prompt, SamplingArguments(fits + 1))
    for prompt in ("the " * 8, "the " * 9):  # no room for a single token: requesting fewer would not help
        with pytest.raises(InputError, match=rf"prompt has {len(prompt)} tokens, .* shorten it to at most 31 tokens"):
            generate_texts(model, tokenizer, prompt, SamplingArguments(1))
    # An empty prompt has one token, end of text.
    assert len(generate_texts(model, tokenizer, "", SamplingArguments(CONTEXT - 1, greedy=True))[0]) == CONTEXT - 1
    with pytest.raises(InputError, match="has 1 token, which with 32 new"):
        generate_texts(model, tokenizer, "", SamplingArguments(CONTEXT))


@pytest.mark.parametrize(("prompt", "named"), [("the Fox", "'F'"), ("the\nfox", r"'\\n'"), ("é", "'é'")])
def test_unknown_characters_are_reported(prompt, named, model, tokenizer):
    with pytest.raises(InputError, match=f"has {named}, which the tokenizer cannot encode"):
        generate_texts(model, tokenizer, prompt, SamplingArguments(5))


def test_byte_level_tokenizers_know_every_text(tiny_config):
    # As in GPT-2, the unknown token is the end of text, which may be typed in a prompt.
    tokenizer = train_tokenizer(["the quick brown fox"], kind="bpe", vocab_size=270)
    tokenizer.unk_token = tokenizer.eos_token
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config(vocab_size=len(tokenizer))).eval()
    (text,) = generate_texts(model, tokenizer, "é\N{FOX FACE}<|endoftext|>the", SamplingArguments(5, greedy=True))
    assert text.startswith("é\N{FOX FACE}the")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        (
            {"temperature": 0.0},
            "it must be above 0: for greedy decoding, use --greedy",
        ),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be above 0"),
        ({"temperature": math.nan}, "temperature is nan; it must be above 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
        ({"greedy": True, "num_samples": 2}, "greedy generates one text, not 2"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message) as error:
        SamplingArguments(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suppress_tokens", "x"),
        ("repetition_penalty", [1]),
        ("stop_strings", ["."]),
        ("eos_token_id", "end"),
        ("cache_implementation", "none such"),
    ],
)
def test_an_invalid_value_in_generation_config_is_a_one_line_error(name, value, make_model, tokenizer):
    model = make_model()
    setattr(model.generation_config, name, value)
    with pytest.raises(InputError, match=r"the model's generation_config.json cannot be used \(.+\): fix") as error:
        generate_texts(model, tokenizer, "the ", SamplingArguments(4))
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None


def test_a_generation_config_that_requests_more_than_ids_gives_the_same_text(model, make_model, tokenizer):
    asking = make_model()
    asking.generation_config.return_dict_in_generate = asking.generation_config.output_scores = True
    plain, other = (generate_texts(m, tokenizer, "the ", SamplingArguments(4)) for m in (model, asking))
    assert plain == other


def test_a_bug_is_not_blamed_on_an_empty_generation_config(make_model, tokenizer, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a bug")

    model = make_model()
    model.generation_config.suppress_tokens = None
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        generate_texts(model, tokenizer, "the ", SamplingArguments(4))


def test_a_system_error_is_not_blamed_on_generation_config(model, tokenizer):
    class Gone(TextStreamer):
        def put(self, value):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        generate_texts(model, tokenizer, "the ", SamplingArguments(4), Gone(tokenizer))


def test_the_streamer_gets_the_same_text(model, tokenizer, capsys):
    arguments = SamplingArguments(12, temperature=1.5, top_k=0)
    expected = generate_texts(model, tokenizer, "the ", arguments)
    assert capsys.readouterr().out == ""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    assert generate_texts(model, tokenizer, "the ", arguments, streamer) == expected
    assert capsys.readouterr().out == expected[0] + "\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_are_made_visible_only_on_a_terminal(is_terminal, monkeypatch):
    text = "hi\x1b[2J \x9b1m\u202e\r\n\tthere\n"
    tokenizer = train_tokenizer([text], kind="char")
    out = io.StringIO()
    out.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stdout", out)
    streamer = TerminalStreamer(tokenizer)
    for index in tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([index]))
    streamer.end()
    shown = "hi\\x1b[2J \\x9b1m\\u202e\\r\n\tthere\n"
    assert out.getvalue() == (shown if is_terminal else text) + "\n"
