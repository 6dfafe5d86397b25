"""Caches, generation and the end of the context.

`CLOSE`: a cache changes the order of float32 sums, which changes these logits, of about 5 at most, by up to 2e-6; a
wrong position or one token too many changes them by 0.01 or more. Generated ids are compared exactly: the best two
tokens are never that close here.
"""

import copy
import logging
import re

import pytest
import torch
from torch.testing import assert_close
from transformers import ContinuousBatchingConfig, DynamicCache, StaticCache
from transformers.utils import logging as transformers_logging

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


# Generation at the end of the context

WARNING = r"may exceed the context length of this model \(32, max_position_embeddings\): generation ends there"
STATIC = {"cache_implementation": "static", "disable_compile": True}
MODES = {
    "greedy": {"do_sample": False},
    "without a cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, **STATIC},
    "sampling": {"do_sample": True, "top_k": 5},
    "several samples": {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
}


@pytest.fixture
def warnings_of_the_model():
    """What the model warns of; once per process, so earlier warnings are forgotten."""
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = transformers_logging.get_logger(HfGPTForCausalLM.__module__)
    transformers_logging.get_logger("transformers").warning_once.__func__.cache_clear()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def seeded(model, *args, **kwargs) -> torch.Tensor:
    torch.manual_seed(3)
    return model.generate(*args, **kwargs)


@pytest.mark.parametrize("mode", MODES)
def test_generation_ends_at_the_context(mode, model):
    ids = make_ids(1 if mode == "prompt lookup" else 2, 26)
    expected = seeded(model, ids, max_new_tokens=6, **MODES[mode])
    assert expected.shape[1] == CONTEXT
    for length in ({"max_new_tokens": 7}, {"max_new_tokens": 1000}, {"max_length": 33}, {"max_length": 1000}):
        assert torch.equal(seeded(model, ids, **length, **MODES[mode]), expected)
    assert seeded(model, ids, max_new_tokens=5, **MODES[mode]).shape[1] == CONTEXT - 1


def test_one_warning_says_that_generation_ends_at_the_context(model, warnings_of_the_model):
    generate(model, make_ids(2, 30), 2)
    assert warnings_of_the_model == []
    generate(model, make_ids(2, 30), 3)
    generate(model, make_ids(2, 20), 100)
    (warning,) = warnings_of_the_model
    assert re.search(WARNING, warning)


def test_an_end_of_text_before_the_context_ends_generation(model):
    ids = make_ids(1, 26)
    tokens = generate(model, ids, 6)[0, 26:].tolist()
    end = tokens[2]
    assert generate(model, ids, 1000, eos_token_id=end)[0, 26:].tolist() == tokens[: tokens.index(end) + 1]


@pytest.mark.parametrize("mode", ["greedy", "without a cache", "static cache", "beams"])
@pytest.mark.parametrize("new_tokens", [4, 12, 40])
def test_each_row_of_a_padded_batch_ends_at_the_context(new_tokens, mode, model):
    """40 columns; the rows have 30, 17 and 25 tokens, so that even the longest is padded."""
    rows = [make_ids(1, length, seed=length) for length in (30, 17, 25)]
    ids = torch.cat([torch.nn.functional.pad(row, (40 - row.shape[1], 0), value=5) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (40 - row.shape[1], 0)) for row in rows])
    options = MODES[mode] | {"pad_token_id": 0, "num_return_sequences": 1}
    if mode == "beams":
        options["eos_token_id"] = 63
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)[:, 40:]
    assert generated.shape[1] <= min(new_tokens, CONTEXT - 17)
    for row, tokens in zip(rows, generated, strict=True):
        alone = model.generate(row, max_new_tokens=min(new_tokens, CONTEXT - row.shape[1]), **options)
        alone = alone[0, row.shape[1] :].tolist()
        assert tokens.tolist() == alone + [0 if mode != "beams" else tokens[-1]] * (len(tokens) - len(alone))


def test_rows_that_end_at_different_steps_need_a_padding_token(model):
    ids, mask = make_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :3] = 0
    model.generation_config.pad_token_id = None
    assert generate(model, ids, 2, attention_mask=mask).shape == (2, 32)
    with pytest.raises(ValueError, match=r"rows reach the end of the context at different steps.*set pad_token_id"):
        generate(model, ids, 3, attention_mask=mask)
    with pytest.raises(ValueError, match=r"at different steps.*set eos_token_id"):
        generate(model, ids, 3, attention_mask=mask, pad_token_id=0, num_beams=2)


@pytest.mark.parametrize("length", [32, 40])
def test_a_prompt_that_leaves_no_room_is_refused(length, model):
    match = rf"prompt length {length} leaves no room.*context length 32: shorten the prompt to at most 31 tokens"
    with pytest.raises(ValueError, match=match):
        generate(model, make_ids(2, length), 1)
    assert generate(model, make_ids(2, 31), 1000).shape == (2, 32)


def test_generation_from_embeddings_ends_at_the_context(model):
    ids = make_ids(2, 30)
    embeddings = model.get_input_embeddings()(ids)
    for new_tokens in (2, 3, 1000):
        assert torch.equal(
            generate(model, None, new_tokens, inputs_embeds=embeddings), generate(model, ids, 2)[:, 30:]
        )


def test_a_continued_cache_ends_at_the_context(model):
    ids = make_ids(1, 20)
    cache = DynamicCache(config=model.config)
    first = generate(model, ids, 4, past_key_values=cache)
    assert torch.equal(generate(model, first, 1000, past_key_values=cache), generate(model, ids, 12))


def test_a_streamer_gets_the_tokens_that_fit(model):
    class Streamer:
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Streamer()
    ids = make_ids(1, 29)
    expected = generate(model, ids, 1000, streamer=streamer)
    assert [token for part in streamer.parts for token in part] == expected[0].tolist()
    assert streamer.ended


def test_continuous_batching_ends_each_request_at_the_context(tiny_config):
    """One request past the context ends alone, and a prompt that does not fit fails alone."""
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config(bos_token_id=None, eos_token_id=None)).eval()
    model.generation_config.pad_token_id = 0
    prompts = [make_ids(1, length, seed=length)[0].tolist() for length in (5, 32, 30, 31, 45, 10)]
    fitting = [prompt for prompt in prompts if len(prompt) < CONTEXT]
    expected = [generate(model, torch.tensor([prompt]), 8)[0, len(prompt) :].tolist() for prompt in fitting]
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=8, do_sample=False, eos_token_id=-1)
    batching = ContinuousBatchingConfig(block_size=16, num_blocks=64, max_batch_tokens=64)
    results = list(model.generate_batch(prompts, config, continuous_batching_config=batching, warmup=False).values())
    assert [len(result.prompt_ids) for result in results] == [len(prompt) for prompt in prompts]
    done = [result for result in results if result.error is None]
    assert [result.generated_tokens for result in done] == expected
    assert [len(result.generated_tokens) for result in done] == [8, 2, 1, 8]
    for result in results:
        if len(result.prompt_ids) >= CONTEXT:
            assert re.search(r"prompt length (32|45) leaves no room", result.error)
