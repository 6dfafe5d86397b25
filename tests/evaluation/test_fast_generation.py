"""Fast generation: the tokens, scores and caches of transformers' own loop, for whatever settings it is used with.

Products with joined weights are the same sums; `CLOSE` allows for another order of them on other processors.
"""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from hfgpt import HfGPTConfig, HfGPTForCausalLM, InputError
from hfgpt.evaluation import decoding_steps
from hfgpt.evaluation.decoding_steps import PART, LargeHead, LargeStep, SmallLinear, SmallStep
from hfgpt.evaluation.fast_generation import speed_up_generation
from hfgpt.modeling_hfgpt import multiply_row, project
from hfgpt.tokenizer import train_tokenizer

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROMPT = torch.tensor([[5, 9, 2, 40]])


@pytest.fixture(params=["in NumPy", "in PyTorch"])
def steps(request, monkeypatch) -> str:
    """How the tiny models of these tests are computed: as small ones, or as if they were large."""
    if request.param == "in PyTorch":
        monkeypatch.setattr(decoding_steps, "FEW_WEIGHTS", 0)
    return request.param


@pytest.fixture(params=[{}, {"qkv_bias": False, "hidden_act": "relu", "tie_word_embeddings": False}])
def model(request, steps, tiny_config):
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config(bos_token_id=None, eos_token_id=None, **request.param)).eval()
    for parameter in model.parameters():  # otherwise the text repeats itself
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.model.embed_positions.weight, std=3)
    return model


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def count_steps(model, monkeypatch) -> list[int]:
    """The positions for which the fast loop computes a step, from now on."""
    positions = []
    for kind in (LargeStep, SmallStep):

        def counted(self, token, index, caches, step=kind.__call__):
            positions.append(index)
            return step(self, token, index, caches)

        monkeypatch.setattr(kind, "__call__", counted)
    return positions


def generate(model, seed: int = 0, **settings):
    torch.manual_seed(seed)
    return model.generate(PROMPT, **{"max_new_tokens": 20, "do_sample": False, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 1},
        {"max_new_tokens": 100},  # more than the context of 32
        {"max_length": 12, "max_new_tokens": None},
        {"suppress_tokens": [1, 2, 3], "min_new_tokens": 5},
    ],
)
def test_the_tokens_are_those_of_generate(settings, model, monkeypatch):
    expected = [generate(model, seed, **settings) for seed in range(3)]
    speed_up_generation(model)
    positions = count_steps(model, monkeypatch)
    for seed, ids in enumerate(expected):
        assert generate(model, seed, **settings).tolist() == ids.tolist()
    assert len(positions) == sum(ids.shape[1] - 4 - 1 for ids in expected)
    if settings.get("max_new_tokens") != 1:
        assert len(set(expected[0][0, 4:].tolist())) > 3, "the text is not trivial"


def test_the_end_of_text_token_and_stopping_criteria_end_the_text(model, monkeypatch):
    ids = generate(model)[0, 4:].tolist()
    speed_up_generation(model)
    positions = count_steps(model, monkeypatch)
    stopped = generate(model, eos_token_id=ids[5], pad_token_id=0)[0, 4:].tolist()
    assert stopped == ids[: ids.index(ids[5]) + 1]
    several = [ids[7], ids[5]]
    stopped = generate(model, eos_token_id=several, pad_token_id=0)[0, 4:].tolist()
    assert stopped == ids[: min(map(ids.index, several)) + 1]
    assert positions
    late = StoppingCriteriaList([MaxTimeCriteria(max_time=-1)])
    assert generate(model, stopping_criteria=late)[0, 4:].tolist() == ids[:1]


def test_processors_see_the_text_so_far(model):
    def processors():
        return LogitsProcessorList(
            [RepetitionPenaltyLogitsProcessor(5.0), MinNewTokensLengthLogitsProcessor(4, 6, eos_token_id=[0])]
        )

    expected = generate(model, logits_processor=processors())
    assert expected.tolist() != generate(model).tolist()
    assert generate(speed_up_generation(model), logits_processor=processors()).tolist() == expected.tolist()


def test_a_streamer_gets_the_prompt_and_each_token(model):
    ids = generate(model)
    recorder = Recorder()
    generate(speed_up_generation(model), streamer=recorder)
    assert recorder.parts == [PROMPT[0].tolist(), *([token] for token in ids[0, 4:].tolist())]
    assert recorder.ended


def test_returned_logits_scores_and_cache(model, monkeypatch):
    settings = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, "top_k": 5}
    expected = generate(model, do_sample=True, **settings)
    speed_up_generation(model)
    positions = count_steps(model, monkeypatch)
    found = generate(model, do_sample=True, **settings)
    assert len(positions) == 19
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert_close(torch.cat(found.logits), torch.cat(expected.logits), **CLOSE)
    assert_close(torch.cat(found.scores), torch.cat(expected.scores), **CLOSE)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == 23
    for ours, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert_close(ours.keys, theirs.keys, **CLOSE)
        assert_close(ours.values, theirs.values, **CLOSE)
    # The results can be used in training, and to continue.
    for tensor in (found.sequences, found.logits[0], found.scores[0], found.past_key_values.layers[0].keys):
        assert not tensor.is_inference()
    continued = model.generate(found.sequences, past_key_values=found.past_key_values, max_new_tokens=3)
    del model.decoding_loop
    again = model.generate(expected.sequences, past_key_values=expected.past_key_values, max_new_tokens=3)
    assert continued.tolist() == again.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"inputs": PROMPT.repeat(2, 1)},
        {"attention_mask": torch.tensor([[0, 1, 1, 1]])},
        {"position_ids": torch.tensor([[7, 8, 9, 10]])},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"past_key_values": "of the first two tokens"},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(8)])},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_settings_use_the_loop_of_transformers(settings, model, monkeypatch):
    def run():
        chosen = {"inputs": PROMPT, "max_new_tokens": 6, "do_sample": False, **settings}
        if "past_key_values" in settings:
            chosen["past_key_values"] = DynamicCache(config=model.config)
            with torch.no_grad():
                model(PROMPT[:, :2], past_key_values=chosen["past_key_values"], use_cache=True)
        torch.manual_seed(0)
        found = model.generate(**chosen)
        return getattr(found, "sequences", found).tolist()

    expected = run()
    speed_up_generation(model, half=True)
    positions = count_steps(model, monkeypatch)
    assert run() == expected
    assert not positions


def hook_on(module):
    module.register_forward_hook(lambda module, args, output: output * 1.5)


def replaced_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.5


@pytest.mark.parametrize(
    "change",
    [
        lambda model: hook_on(model.model.layers[0].mlp.up_proj),
        lambda model: hook_on(model.model.layers[0]),
        lambda model: hook_on(model.model.embed_tokens),
        lambda model: replaced_forward(model.model.layers[0].mlp),
        lambda model: model.add_adapter(LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)),
        lambda model: setattr(model.model.layers[0], "mlp", torch.nn.Linear(16, 16)),
        lambda model: setattr(model.model, "norm", torch.nn.LayerNorm(16, bias=False)),
        lambda model: setattr(model, "lm_head", torch.nn.Linear(16, 64)),
        lambda model: setattr(model.model.layers[0].self_attn, "k_proj", torch.nn.Linear(16, 16, bias=False)),
    ],
)
def test_changes_of_the_model_are_not_left_out(change, tiny_config, monkeypatch):
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config(hidden_size=16, bos_token_id=None, eos_token_id=None)).eval()
    speed_up_generation(model)
    change(model)
    positions = count_steps(model, monkeypatch)
    found = generate(model)
    model.decoding_loop = None
    assert found.tolist() == generate(model).tolist()
    assert not positions
    with pytest.raises(InputError, match="without adapters, quantized weights and hooks"):
        speed_up_generation(model)


def test_prompt_tuning_around_the_model_is_not_left_out(model):
    tuned = get_peft_model(speed_up_generation(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    torch.nn.init.normal_(tuned.prompt_encoder["default"].embedding.weight, std=3)
    tuned.eval()
    found = tuned.generate(input_ids=PROMPT, max_new_tokens=6, do_sample=False)
    del model.decoding_loop
    assert found.tolist() == tuned.generate(input_ids=PROMPT, max_new_tokens=6, do_sample=False).tolist()


def test_stop_strings(model, monkeypatch):
    tokenizer = train_tokenizer(["abcdefgh " * 20], kind="char")
    ids = generate(model)[0, 4:].tolist()
    known = next(token for token in ids if token in tokenizer.get_vocab().values())
    settings = {"stop_strings": [tokenizer.decode([known])], "tokenizer": tokenizer}
    expected = generate(model, **settings)
    assert expected.shape[1] == 5 + ids.index(known)
    speed_up_generation(model)
    positions = count_steps(model, monkeypatch)
    assert generate(model, **settings).tolist() == expected.tolist()
    assert len(positions) == ids.index(known)


def test_an_empty_cache_is_filled(model, monkeypatch):
    caches = []
    for fast in (False, True):
        if fast:
            speed_up_generation(model)
            positions = count_steps(model, monkeypatch)
        caches.append(DynamicCache(config=model.config))
        generate(model, past_key_values=caches[-1], max_new_tokens=5)
    assert len(positions) == 4
    for theirs, ours in zip(caches[0].layers, caches[1].layers, strict=True):
        assert ours.keys.shape[2] == 8
        assert_close(ours.keys, theirs.keys, **CLOSE)
        assert_close(ours.values, theirs.values, **CLOSE)


def test_processors_and_criteria_can_compute_gradients_and_change_their_inputs(model):
    kept, seen = [], []

    def process(ids, scores):
        with torch.enable_grad():
            weight = scores.new_ones(1, requires_grad=True)
            (weight * scores.sum()).backward()
        kept.append(scores)
        for earlier in kept:
            earlier += 1
        return scores

    def stop(ids, scores, **kwargs):
        seen.append(scores)
        return torch.zeros(1, dtype=torch.bool)

    expected = generate(model)
    settings = {"logits_processor": LogitsProcessorList([process])}
    assert generate(speed_up_generation(model), **settings).tolist() == expected.tolist()
    generate(model, stopping_criteria=StoppingCriteriaList([stop]))
    assert set(seen) == {None}, "as in transformers, only with returned scores"


def test_autocast_uses_the_loop_of_transformers(model, monkeypatch):
    speed_up_generation(model)
    positions = count_steps(model, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        generate(model)
    assert not positions


@pytest.mark.parametrize("half", [False, True])
def test_a_model_converted_later_uses_the_loop_of_transformers(half, model, monkeypatch):
    speed_up_generation(model, half).bfloat16()
    positions = count_steps(model, monkeypatch)
    found = generate(model)
    assert not positions
    del model.decoding_loop
    assert generate(model).tolist() == found.tolist()


def test_a_model_in_training_mode_keeps_its_dropout(tiny_config, monkeypatch):
    model = HfGPTForCausalLM(tiny_config(resid_pdrop=0.5, bos_token_id=None, eos_token_id=None))
    speed_up_generation(model)
    positions = count_steps(model, monkeypatch)
    generate(model.train())
    assert not positions


@pytest.mark.parametrize("half", [False, True])
def test_changed_weights_are_read_again(half, model):
    speed_up_generation(model, half)
    before = generate(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    changed = generate(model)
    assert changed.tolist() != before.tolist()
    again = generate(speed_up_generation(model, half))
    assert again.tolist() == changed.tolist()


def test_in_float32_all_changes_of_weights_are_noticed(model):
    speed_up_generation(model)
    before = generate(model)
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(-1)  # not noticed by PyTorch
    changed = generate(model)
    assert changed.tolist() != before.tolist()
    del model.decoding_loop
    assert generate(model).tolist() == changed.tolist()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.norm, "eps", 9),
        lambda model: setattr(model.model.layers[0].input_layernorm, "eps", 9),
        lambda model: setattr(model.model.layers[1].post_attention_layernorm, "eps", 9),
        lambda model: setattr(model.model.layers[1].self_attn, "scaling", 1),
        lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.Sigmoid()),
    ],
)
def test_replaced_settings_are_noticed(change, half, model, monkeypatch):
    settings = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4}
    speed_up_generation(model, half)
    before = torch.cat(generate(model, **settings).logits)
    change(model)
    positions = count_steps(model, monkeypatch)
    changed = torch.cat(generate(model, **settings).logits)
    assert len(positions) == 3
    del model.decoding_loop
    expected = torch.cat(generate(model, **settings).logits)
    tolerance = (0.003 if half else 1e-5) * expected.abs().max()
    assert (changed - expected).abs().max() < tolerance
    assert (changed - before).abs().max() > 3 * tolerance


def test_ids_of_32_bits(model):
    expected = model.generate(PROMPT.int(), max_new_tokens=5, do_sample=False)
    ids = speed_up_generation(model).generate(PROMPT.int(), max_new_tokens=5, do_sample=False)
    assert torch.equal(ids, expected)
    assert ids.dtype == expected.dtype


@pytest.mark.parametrize("half", [False, True])
def test_a_pickled_model_has_no_second_copy_of_its_weights(half, model):
    size = len(pickle.dumps(model))
    pickled = pickle.dumps(speed_up_generation(model, half))
    assert len(pickled) < size + 1000
    assert generate(pickle.loads(pickled)).tolist() == generate(model).tolist()


def test_a_copy_and_a_saved_model_are_independent(model, tmp_path):
    speed_up_generation(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(-1)
    fast = generate(other)
    del other.decoding_loop
    assert generate(other).tolist() == fast.tolist() != generate(model).tolist()
    model.save_pretrained(tmp_path)
    assert generate(AutoModelForCausalLM.from_pretrained(tmp_path)).tolist() == generate(model).tolist()


@pytest.mark.parametrize("steps", ["in PyTorch"], indirect=True)
def test_half_rounds_to_float16(model, monkeypatch):
    settings = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 3}
    expected = generate(model, **settings)
    speed_up_generation(model, half=True)
    positions = count_steps(model, monkeypatch)
    found = generate(model, **settings)
    assert len(positions) == 2
    assert found.sequences.tolist() == expected.sequences.tolist()
    ours, theirs = torch.cat(found.logits), torch.cat(expected.logits)
    assert torch.equal(ours[0], theirs[0]), "the prompt is processed in float32"
    assert 0 < (ours - theirs).abs().max() < 0.01 * theirs.abs().max()


@pytest.mark.parametrize("steps", ["in PyTorch"], indirect=True)
def test_half_keeps_logits_that_are_far_from_zero_together(model):
    """Otherwise, float16 would round these, of about 1,000, to multiples of one half."""
    with torch.no_grad():
        model.model.norm.bias.fill_(1)
        model.lm_head.weight.add_(1000 / model.config.hidden_size)
    settings = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4}
    expected = torch.cat(generate(model, **settings).logits)
    assert expected.min() > 500
    found = torch.cat(generate(speed_up_generation(model, half=True), **settings).logits)
    assert (found - expected).abs().max() < 0.1


@pytest.mark.parametrize("steps", ["in PyTorch"], indirect=True)
def test_half_refuses_what_is_too_large(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000
    with pytest.raises(InputError, match="a weight is too large for float16: use half=False"):
        speed_up_generation(model, half=True)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 60_000
        model.model.layers[1].post_attention_layernorm.bias.fill_(100)
    speed_up_generation(model, half=True)
    with pytest.raises(InputError, match="a value became too large for float16: use half=False"):
        generate(model)


@pytest.mark.parametrize("steps", ["in PyTorch"], indirect=True)
def test_a_weight_that_is_too_large_is_refused_each_time(model):
    speed_up_generation(model, half=True)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000
    for _ in range(2):
        with pytest.raises(InputError, match="a weight is too large for float16"):
            generate(model)


@pytest.mark.parametrize("steps", ["in NumPy"], indirect=True)
def test_half_leaves_small_models_in_float32(model):
    settings = {"return_dict_in_generate": True, "output_logits": True}
    expected = torch.cat(generate(speed_up_generation(model), **settings).logits)
    assert torch.equal(torch.cat(generate(speed_up_generation(model, half=True), **settings).logits), expected)


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 1e-2)])
def test_small_blocks_with_a_large_head(half, tolerance, tiny_config, monkeypatch):
    monkeypatch.setattr(decoding_steps, "FEW_WEIGHTS", 4 * 32 * 32)
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config(vocab_size=150, bos_token_id=None, eos_token_id=None)).eval()
    settings = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 3}
    expected = torch.cat(generate(model, **settings).logits)
    speed_up_generation(model, half)
    assert type(model.decoding_loop.step) is SmallStep
    assert type(model.decoding_loop.step.head) is LargeHead
    assert_close(torch.cat(generate(model, **settings).logits), expected, atol=tolerance * expected.std(), rtol=0)


@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_are_those_of_generate(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.inf
    settings = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 3}
    expected = torch.cat(generate(model, **settings).logits)
    assert expected.isnan().any()
    found = torch.cat(generate(speed_up_generation(model), **settings).logits)
    assert_close(found, expected, equal_nan=True, **CLOSE)


def test_other_models_are_refused(tiny_config):
    with pytest.raises(InputError, match="not a GPT2LMHeadModel: merge an adapter first"):
        speed_up_generation(_gpt2())
    with pytest.raises(InputError, match=r"weights in float32 on the CPU, not in torch.bfloat16 on cpu"):
        speed_up_generation(HfGPTForCausalLM(tiny_config()).bfloat16())


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32))


# Products of one row


@pytest.mark.parametrize("inputs", [128, 300, 2 * PART])
@pytest.mark.parametrize("rows", [1, 65, 211])
@pytest.mark.parametrize("bias", [True, False])
def test_small_layers_are_multiplied_together_in_parts(inputs, rows, bias):
    layers = [torch.nn.Linear(inputs, rows, bias=bias) for _ in range(3)]
    row = torch.randn(inputs)
    together = SmallLinear(*layers)
    assert all(part.size <= max(PART, inputs) for part in together.parts)
    expected = torch.cat([layer(row) for layer in layers]).detach()
    assert_close(torch.from_numpy(together(row.numpy())), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 1000])
@pytest.mark.parametrize("rows", [512, 513, 515])
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_is_multiplied_in_parts(threads, rows, bias, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    linear, row = torch.nn.Linear(512, rows, bias=bias), torch.randn(1, 512)
    expected = linear(row).detach()
    assert_close(multiply_row(row, linear.weight.detach(), linear.bias), expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        found = project(linear, row.view(1, 1, 512))
    assert found.shape == (1, 1, rows)
    assert_close(found[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_only_one_row_without_gradients_is_multiplied_in_parts(monkeypatch):
    calls = []
    monkeypatch.setattr("hfgpt.modeling_hfgpt.multiply_row", lambda *_: calls.append(1) or torch.zeros(1, 512))
    linear, row = torch.nn.Linear(512, 512), torch.randn(1, 1, 512)
    project(linear, row)
    with torch.no_grad():
        project(linear, row.expand(1, 2, 512))
        project(torch.nn.Linear(512, 128), row)
        with torch.autocast("cpu", torch.bfloat16):
            project(linear, row)
        linear.requires_grad_(False)
        torch.jit.trace(lambda inputs: project(linear, inputs), row, check_trace=False)
    assert not calls
    with torch.no_grad():
        project(linear, row)
    assert calls == [1]


def test_hooks_of_a_layer_are_called(tiny_config):
    linear, seen = torch.nn.Linear(512, 512), []
    linear.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        project(linear, torch.randn(1, 1, 512))
    assert seen == [1]


def test_generation_configurations_are_left_as_they_are(model):
    config = GenerationConfig(max_new_tokens=5, do_sample=False)
    before = config.to_dict()
    speed_up_generation(model).generate(PROMPT, generation_config=config)
    assert config.to_dict() == before
    assert isinstance(model.config, HfGPTConfig)
