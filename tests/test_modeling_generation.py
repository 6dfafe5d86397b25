"""Caches, generation and the end of the context.

`CLOSE`: a cache changes the order of float32 sums, which changes these logits, of about 5 at most, by up to 2e-6; a
wrong position or one token too many changes them by 0.01 or more. Generated ids are compared exactly: the best two
tokens are never that close here.
"""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification, HfGPTModel

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CONTEXT = 32


@pytest.fixture(params=["sdpa", "eager"])
def model(request, tiny_config):
    torch.manual_seed(0)
    # No end of text: generation continues to the requested length.
    model = HfGPTForCausalLM(tiny_config(bos_token_id=None, eos_token_id=None)).eval()
    model.set_attn_implementation(request.param)
    model.generation_config.pad_token_id = 0
    return model


def make_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


def make_cache(kind: str, model):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=CONTEXT)


# Caches


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("cuts", [[1] * 20, [20], [7, 1, 1, 11], [1, 19], [10, 10]])
@torch.no_grad()
def test_cached_steps_give_the_logits_of_the_full_sequence(kind, cuts, model):
    ids = make_ids(2, 20)
    expected = model(ids, use_cache=False).logits
    cache, parts = make_cache(kind, model), []
    for part in ids.split(cuts, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    assert int(cache.get_seq_length()) == 20


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("cuts", [[12] + [1] * 8, [5, 9, 6]])
@torch.no_grad()
def test_cached_steps_of_padded_rows(kind, cuts, model):
    ids = make_ids(3, 20)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, :3] = mask[2, :11] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache, parts, seen = make_cache(kind, model), [], 0
    for part in ids.split(cuts, dim=1):
        seen += part.shape[1]
        parts.append(model(part, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    assert_close(torch.cat(parts, dim=1)[mask.bool()], expected[mask.bool()], **CLOSE)


@torch.no_grad()
def test_a_cache_is_created_on_request(model):
    ids = make_ids(2, 5)
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 5
    assert model(ids).past_key_values.get_seq_length() == 5  # the configuration's default
    model.config.use_cache = False
    assert model(ids).past_key_values is None


@torch.no_grad()
def test_a_mask_that_does_not_cover_the_cache_is_refused(model):
    ids = make_ids(2, 8)
    cache = model(ids).past_key_values
    for position_ids in (None, torch.arange(8, 11).unsqueeze(0)):
        with pytest.raises(ValueError, match=r"covers 3 tokens.*cache has 8 and the input 3.*all 11"):
            model(ids[:, :3], attention_mask=torch.ones(2, 3), position_ids=position_ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"covers 7 tokens.*cache has 0 and the input 8"):
        model(ids, attention_mask=torch.ones(2, 7))
    assert cache.get_seq_length() == 8


# Generation


def generate(model, ids, new_tokens=8, **kwargs) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **kwargs)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_greedy_generation_takes_the_best_next_token_each_time(options, model):
    ids = make_ids(2, 10)
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert len(set(expected[0, 10:].tolist())) > 3  # otherwise a wrong cache might not show
    assert torch.equal(generate(model, ids, use_cache=False), expected)
    assert torch.equal(generate(model, ids, **options), expected)


def test_a_left_padded_batch_generates_what_each_row_generates_alone(model):
    rows = [make_ids(1, length, seed=length) for length in (10, 3, 6)]
    ids = torch.cat([torch.nn.functional.pad(row, (10 - row.shape[1], 0), value=5) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (10 - row.shape[1], 0)) for row in rows])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        generated = generate(model, ids, attention_mask=mask, **options)[:, 10:]
        for row, tokens in zip(rows, generated, strict=True):
            assert torch.equal(tokens, generate(model, row)[0, row.shape[1] :])


def test_beam_search_finds_a_more_likely_continuation_with_and_without_a_cache(model):
    ids = make_ids(2, 10)
    beams = generate(model, ids, num_beams=4)
    assert beams.shape == (2, 18)
    assert torch.equal(beams, generate(model, ids, num_beams=4, use_cache=False))

    def likelihood(sequences):
        logits = model(sequences).logits[:, 9:-1].log_softmax(-1)
        return logits.gather(-1, sequences[:, 10:].unsqueeze(-1)).sum((1, 2))

    with torch.no_grad():
        assert (likelihood(beams) > likelihood(generate(model, ids)) + 1e-3).any()


def test_sampling_and_assisted_generation(model, tiny_config):
    ids = make_ids(1, 10)
    torch.manual_seed(1)
    sampled = model.generate(ids, max_new_tokens=8, do_sample=True, top_k=5, num_return_sequences=3)
    assert sampled.shape == (3, 18)
    assert len(set(map(tuple, sampled.tolist()))) > 1
    assistant = HfGPTForCausalLM(tiny_config(num_hidden_layers=1, bos_token_id=None, eos_token_id=None)).eval()
    assistant.generation_config.pad_token_id = 0
    assert torch.equal(generate(model, ids, assistant_model=assistant), generate(model, ids))


def test_generation_from_embeddings(model):
    ids = make_ids(2, 10)
    generated = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(generated[:, -8:], generate(model, ids)[:, 10:])


# The context

TOO_LONG = r"sequence has 33 tokens.*context length of this model is 32 \(max_position_embeddings\)"


@pytest.mark.parametrize("model_class", [HfGPTModel, HfGPTForCausalLM, HfGPTForSequenceClassification])
@torch.no_grad()
def test_more_tokens_than_the_context_are_refused(model_class, tiny_config):
    model = model_class(tiny_config(pad_token_id=0)).eval()
    ids = make_ids(2, CONTEXT + 1)
    mask = torch.ones_like(ids)
    for arguments in (
        {"input_ids": ids},
        {"input_ids": ids, "use_cache": False},
        {"input_ids": ids, "attention_mask": mask},
        {"inputs_embeds": torch.randn(2, CONTEXT + 1, 32)},
        {"input_ids": ids, "position_ids": torch.arange(CONTEXT + 1).unsqueeze(0)},
        {"input_ids": ids[:, :3], "position_ids": torch.tensor([[CONTEXT - 2, CONTEXT - 1, CONTEXT]])},
        {"input_ids": ids[:, :3], "position_ids": torch.tensor([[0, CONTEXT, 1]])},
    ):
        with pytest.raises(ValueError, match=TOO_LONG):
            model(**arguments)
    for arguments in (
        {"input_ids": ids[:, 1:]},
        {"input_ids": ids[:, 1:], "attention_mask": mask[:, 1:]},
        {"input_ids": ids[:, 1:], "position_ids": torch.arange(CONTEXT).unsqueeze(0)},
        {"input_ids": ids[:, :3], "position_ids": torch.tensor([[CONTEXT - 3, CONTEXT - 2, CONTEXT - 1]])},
    ):
        assert model(**arguments)[0].isfinite().all()


@pytest.mark.parametrize("mask", [False, True])
@torch.no_grad()
def test_a_cache_may_be_filled_to_the_end_of_the_context_and_no_further(mask, model):
    ids = make_ids(2, CONTEXT + 1)
    ones = torch.ones_like(ids)
    cache = model(ids[:, :30]).past_key_values
    with pytest.raises(ValueError, match=TOO_LONG):
        model(ids[:, 30:], attention_mask=ones if mask else None, past_key_values=cache)
    last = model(ids[:, 30:32], attention_mask=ones[:, :32] if mask else None, past_key_values=cache).logits
    assert_close(last, model(ids[:, :32]).logits[:, 30:], **CLOSE)
    with pytest.raises(ValueError, match=TOO_LONG):
        model(ids[:, 32:], attention_mask=ones if mask else None, past_key_values=cache)
    with pytest.raises(ValueError, match=TOO_LONG):
        model(ids[:, 32:], position_ids=torch.tensor([[32]]), past_key_values=cache)


@torch.no_grad()
def test_padding_takes_no_space_in_the_context(model):
    """40 columns with a context of 32; the rows have 32 and 5 tokens."""
    rows = [make_ids(1, 32), make_ids(1, 5, seed=1)]
    for side in ("left", "right"):
        padding = [(40 - row.shape[1], 0) if side == "left" else (0, 40 - row.shape[1]) for row in rows]
        ids = torch.cat([torch.nn.functional.pad(row, pad) for row, pad in zip(rows, padding, strict=True)])
        mask = torch.cat(
            [torch.nn.functional.pad(torch.ones_like(row), pad) for row, pad in zip(rows, padding, strict=True)]
        )
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        assert_close(logits, torch.cat([model(row).logits[0] for row in rows]), **CLOSE)
        mask[0] = 1
        mask[0, 33:] = 0
        with pytest.raises(ValueError, match=TOO_LONG):
            model(ids, attention_mask=mask)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_ends_exactly_at_the_context(use_cache, model):
    ids = make_ids(2, 30)
    assert generate(model, ids, 2, use_cache=use_cache).shape == (2, 32)
    for new_tokens in (3, 1000):
        match = rf"length 30 plus max_new_tokens {new_tokens}.*context length 32.*at most 2\b"
        with pytest.raises(ValueError, match=match):
            generate(model, ids, new_tokens, use_cache=use_cache)
    with pytest.raises(ValueError, match=r"prompt length 30 plus max_new_tokens 10.*context length 32"):
        model.generate(ids, max_length=40)
    full = make_ids(2, 32)
    with pytest.raises(ValueError, match=r"prompt length 32 plus max_new_tokens 1.*context length 32.*at most 0\b"):
        generate(model, full, 1)
    with pytest.raises(ValueError, match=r"length 40 plus max_new_tokens 5.*context length 32.*at most 0\b.*shorten"):
        generate(model, make_ids(2, 40), 5)


def test_generation_from_embeddings_ends_at_the_context(model):
    embeddings = model.get_input_embeddings()(make_ids(2, 30))
    assert generate(model, None, 2, inputs_embeds=embeddings).shape == (2, 2)
    with pytest.raises(ValueError, match="32"):
        generate(model, None, 5, inputs_embeds=embeddings)
