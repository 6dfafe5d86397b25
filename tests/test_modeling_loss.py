"""The loss in chunks, without the logits of all rows: loss and gradients are those of the plain loss."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hfgpt import HfGPTConfig, HfGPTForCausalLM, modeling_hfgpt

IGNORED = -100


@pytest.fixture
def chunks(monkeypatch):
    """Makes the loss use chunks for any number of logits; sets the number of rows in a chunk."""

    def use(rows: int, vocab_size: int):
        monkeypatch.setattr(modeling_hfgpt, "MANY_LOGITS", 0)
        monkeypatch.setattr(modeling_hfgpt, "CHUNK_OF_LOGITS", 4 * rows * vocab_size)

    return use


def compute(model, ids, skip_logits, **options):
    """The loss, and the gradients of all weights."""
    model.zero_grad()
    output = model(ids, skip_logits=skip_logits, use_cache=False, **options)
    assert (output.logits is None) == skip_logits
    (3 * output.loss).backward()
    return output.loss, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def draw(vocab_size=64, shape=(3, 20), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(vocab_size, shape, generator=generator) for _ in range(2))
    return ids, targets.masked_fill(torch.rand(shape, generator=generator) < 0.3, IGNORED)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 60, 1000])
@pytest.mark.parametrize("kind", ["labels", "shifted", "given count", "tensor count"])
def test_loss_and_gradients_are_those_of_all_logits(kind, rows, tied, chunks, tiny_config):
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config(tie_word_embeddings=tied))
    ids, targets = draw()
    counts = {"given count": 17, "tensor count": torch.tensor(17)}
    options = {"labels" if kind == "labels" else "shift_labels": targets, "num_items_in_batch": counts.get(kind)}
    expected, gradients = compute(model, ids, skip_logits=False, **options)
    chunks(rows, 64)
    loss, found = compute(model, ids, skip_logits=True, **options)
    torch.testing.assert_close(loss, expected, rtol=5e-7, atol=0)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=5e-6, msg=name)


def test_the_vocabulary_of_gpt2(chunks):
    torch.manual_seed(0)
    config = HfGPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    model, (ids, targets) = HfGPTForCausalLM(config).eval(), draw(50257, (4, 32))
    expected, gradients = compute(model, ids, skip_logits=False, shift_labels=targets)
    chunks(50, 50257)
    loss, found = compute(model, ids, skip_logits=True, shift_labels=targets)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("rows", [7, 60])
def test_mixed_precision_rounds_like_the_plain_loss(rows, chunks, tiny_config):
    torch.manual_seed(0)
    model, (ids, targets) = HfGPTForCausalLM(tiny_config()), draw()
    exact, reference = compute(model, ids, skip_logits=False, shift_labels=targets)
    with torch.autocast("cpu", torch.bfloat16):
        expected, gradients = compute(model, ids, skip_logits=False, shift_labels=targets)
        chunks(rows, 64)
        loss, found = compute(model, ids, skip_logits=True, shift_labels=targets)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) <= 2 * abs(expected - exact) + 1e-4
    for name, gradient in reference.items():
        assert found[name].dtype == torch.float32
        if name.endswith("k_proj.bias"):  # zero but for rounding: the softmax does not change
            continue
        error, usual = (found[name] - gradient).norm(), (gradients[name] - gradient).norm()
        assert error <= 1.5 * usual + 1e-6, name


def test_half_precision_weights_get_gradients_of_their_type(chunks, tiny_config):
    torch.manual_seed(0)
    model, (ids, targets) = HfGPTForCausalLM(tiny_config()).bfloat16(), draw()
    expected, gradients = compute(model, ids, skip_logits=False, shift_labels=targets)
    chunks(7, 64)
    loss, found = compute(model, ids, skip_logits=True, shift_labels=targets)
    torch.testing.assert_close(loss, expected.float(), rtol=0, atol=2e-2)
    for name, gradient in gradients.items():
        assert found[name].dtype == torch.bfloat16
        if not name.endswith("k_proj.bias"):  # zero but for rounding: the softmax does not change
            assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_a_frozen_head_and_no_gradients(chunks, tiny_config):
    torch.manual_seed(0)
    model, (ids, targets) = HfGPTForCausalLM(tiny_config()), draw()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    _, gradients = compute(adapted, ids, skip_logits=False, shift_labels=targets)
    chunks(7, 64)
    loss, found = compute(adapted, ids, skip_logits=True, shift_labels=targets)
    assert found.keys() == gradients.keys()
    assert all("lora" in name for name in found)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=5e-6, msg=name)
    with torch.no_grad():
        assert torch.equal(adapted(ids, shift_labels=targets, skip_logits=True).loss, loss)


def test_rows_without_targets_are_nan_as_usual(chunks, tiny_config):
    model, (ids, targets) = HfGPTForCausalLM(tiny_config()), draw()
    chunks(7, 64)
    assert model(ids, shift_labels=torch.full_like(targets, IGNORED), skip_logits=True).loss.isnan()


def test_logits_are_kept_where_the_loss_needs_them_or_they_are_few(chunks, tiny_config):
    model, (ids, targets) = HfGPTForCausalLM(tiny_config()), draw()
    expected = model(ids, labels=targets)
    few = model(ids, labels=targets, skip_logits=True)
    assert torch.equal(few.logits, expected.logits)
    assert torch.equal(few.loss, expected.loss)
    chunks(7, 64)
    assert torch.equal(model(ids, skip_logits=True).logits, expected.logits), "without labels"
    assert model(ids, labels=ids, skip_logits=True, ignore_index=3).logits is not None
    hook = model.lm_head.register_forward_hook(lambda *args: None)
    assert torch.equal(model(ids, labels=targets, skip_logits=True).logits, expected.logits)
    hook.remove()
    assert model(ids, labels=targets, skip_logits=True).logits is None
    model.loss_function = lambda **kwargs: torch.tensor(5.0)
    assert model(ids, labels=targets, skip_logits=True).loss == 5


def test_gradients_are_used_once(chunks, tiny_config):
    model, (ids, targets) = HfGPTForCausalLM(tiny_config()), draw()
    chunks(7, 64)
    loss = model(ids, shift_labels=targets, skip_logits=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^the gradients of this loss were used before: call backward once"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_keep_the_logits(dtype, chunks, tiny_config):
    model, (ids, targets) = HfGPTForCausalLM(tiny_config()), draw()
    chunks(7, 64)
    assert model.to(dtype)(ids, shift_labels=targets, skip_logits=True).logits is not None
    with torch.autocast("cpu", torch.float16):
        assert model.float()(ids, shift_labels=targets, skip_logits=True).logits is not None
