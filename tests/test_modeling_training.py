"""What training and inspection rely on: loss, dropout, gradient checkpointing, hidden states and attentions.

Tolerances: float32 sums in another order differ by a few 1e-7 where the summands are about 1; `CLOSE` leaves a factor
of ten. Runs of the same operations are compared exactly.
"""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification, HfGPTModel, modeling_hfgpt

CLOSE = {"atol": 5e-6, "rtol": 5e-6}
IMPLEMENTATIONS = ["sdpa", "eager"]


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return HfGPTForCausalLM(tiny_config()).eval()


def make_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target, in float64, computed from the definition."""
    logits = logits.detach().double()
    return logits.exp().sum(-1).log() - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


# Loss


def test_loss_is_the_mean_cross_entropy_of_the_next_token(model):
    ids = make_ids(3, 20)
    output = model(ids, labels=ids)
    expected = cross_entropies(output.logits[:, :-1], ids[:, 1:]).mean()
    assert_close(output.loss.double(), expected, **CLOSE)
    assert model(ids).loss is None
    assert torch.equal(model(ids).logits, output.logits)


def test_shifted_labels_give_every_position_a_target(model):
    ids, targets = make_ids(3, 20), make_ids(3, 20, seed=1)
    expected = cross_entropies(model(ids).logits, targets).mean()
    assert_close(model(ids, shift_labels=targets).loss.double(), expected, **CLOSE)
    # They take precedence over labels.
    assert torch.equal(model(ids, labels=ids, shift_labels=targets).loss, model(ids, shift_labels=targets).loss)


def test_ignored_targets_do_not_count(model):
    ids = make_ids(3, 20)
    ignored = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.5
    output = model(ids, labels=ids.masked_fill(ignored, -100))
    expected = cross_entropies(output.logits[:, :-1], ids[:, 1:])[~ignored[:, 1:]].mean()
    assert_close(output.loss.double(), expected, **CLOSE)
    output = model(ids, shift_labels=ids.masked_fill(ignored, -100))
    assert_close(output.loss.double(), cross_entropies(output.logits, ids)[~ignored].mean(), **CLOSE)


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_number_of_items_divides_the_sum(model, count):
    ids = make_ids(3, 20)
    output = model(ids, labels=ids, num_items_in_batch=count)
    assert_close(output.loss.double(), cross_entropies(output.logits[:, :-1], ids[:, 1:]).sum() / 7, **CLOSE)


def test_loss_and_gradients_do_not_depend_on_micro_batches(model):
    """All 8 ways to divide 4 rows with 19, 9, 3 and 0 targets: the mean of means would be far off."""
    ids = make_ids(4, 20)
    labels = ids.clone()
    for row, learned in enumerate((19, 9, 3, 0)):
        labels[row, : 20 - learned] = -100
    count = int((labels[:, 1:] != -100).sum())
    assert count == 31
    whole = model(ids, labels=labels).loss
    expected = gradients(model, whole)
    for cuts in itertools.product([False, True], repeat=3):
        starts = [0, *(row for row, cut in enumerate(cuts, start=1) if cut), 4]
        losses = [
            model(ids[start:end], labels=labels[start:end], num_items_in_batch=count).loss
            for start, end in itertools.pairwise(starts)
        ]
        assert_close(sum(losses), whole, **CLOSE)
        for name, gradient in gradients(model, sum(losses)).items():
            assert_close(gradient, expected[name], **CLOSE, msg=name)


def test_loss_of_a_half_precision_model_is_summed_in_float32(model):
    model.to(torch.bfloat16)
    ids = make_ids(3, 20)
    output = model(ids, labels=ids)
    assert output.loss.dtype == torch.float32
    assert_close(output.loss.double(), cross_entropies(output.logits[:, :-1], ids[:, 1:]).mean(), **CLOSE)


# Dropout


def dropped(model, implementation: str) -> dict[str, torch.Tensor]:
    """What each of the four kinds of dropout in the first block sets to zero in one forward pass."""
    model.set_attn_implementation(implementation)
    seen, block = {}, model.model.layers[0]
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: seen.__setitem__(name, output))
        for name, module in {
            "embd": model.model.embd_dropout,
            "attention residual": block.self_attn.resid_dropout,
            "mlp residual": block.mlp.resid_dropout,
        }.items()
    ]
    output = model(make_ids(8, 32), output_attentions=implementation == "eager")
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    if implementation == "eager":
        lower = torch.ones(32, 32, dtype=torch.bool).tril()
        seen["attn"] = output.attentions[0][..., lower]
    return {name: values == 0 for name, values in seen.items()} | {"logits": output.logits.detach()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["embd", "resid", "attn"])
def test_each_dropout_is_active_only_in_training(kind, implementation, tiny_config):
    probability = 0.3
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config(**{f"{kind}_pdrop": probability})).train()
    zeros = dropped(model, implementation)
    first = zeros.pop("logits")
    for name, zero in zeros.items():
        if kind in name:
            # Within 5 standard errors; at most a fifth of the 33,000 attention weights is one of its own: 0.04.
            error = 5 * math.sqrt(probability * (1 - probability) / zero.numel())
            assert abs(zero.float().mean() - probability) < error, name
        else:
            assert not zero.any(), name
    assert not torch.allclose(first, dropped(model, implementation)["logits"], atol=0.01)

    model.eval()
    plain = HfGPTForCausalLM(tiny_config()).eval()
    plain.load_state_dict(model.state_dict())
    for name, value in dropped(model, implementation).items():
        assert torch.equal(value, dropped(plain, implementation)[name]), name


# Checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_blocks_and_changes_no_gradient(reentrant, tiny_config):
    """With dropout, whose random draws must be repeated."""
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config(embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.1)).train()
    ids = make_ids(3, 20)
    calls = []
    model.model.layers[1].input_layernorm.register_forward_hook(lambda *_: calls.append(1))

    def step():
        calls.clear()
        torch.manual_seed(1)
        # Checkpointing creates no cache; with one in the first run, sums would be in another order.
        loss = model(ids, labels=ids, use_cache=False).loss
        return loss, gradients(model, loss), len(calls)

    loss, expected, forwards = step()
    assert forwards == 1
    assert len(expected) == len(list(model.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    again, checkpointed, forwards = step()
    assert forwards == 2
    assert torch.equal(again, loss)
    assert checkpointed.keys() == expected.keys()
    assert [n for n in expected if not torch.equal(checkpointed[n], expected[n])] == []
    model.gradient_checkpointing_disable()
    assert step()[2] == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_gradients_to_adapters_with_frozen_embeddings(reentrant, model):
    """As PEFT prepares a model: everything frozen except one projection, and inputs that require gradients."""
    ids = make_ids(3, 20)
    model.train().requires_grad_(False)
    adapted = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    expected = gradients(model, model(ids, labels=ids, use_cache=False).loss)
    assert len(expected) == 1
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    gradients(model, model(ids, labels=ids).loss)
    assert torch.equal(adapted.grad, next(iter(expected.values())))
    assert adapted.grad.abs().max() > 1e-3


def test_checkpointing_is_off_in_evaluation(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model(make_ids(1, 4)).past_key_values.get_seq_length() == 4
    assert model.train()(make_ids(1, 4)).past_key_values is None


# Outputs


@pytest.mark.parametrize("model_class", [HfGPTModel, HfGPTForCausalLM, HfGPTForSequenceClassification])
def test_hidden_states_and_attentions(model_class, tiny_config):
    torch.manual_seed(0)
    model = model_class(tiny_config(attn_implementation="eager")).eval()
    base = model if model_class is HfGPTModel else model.model
    blocks = []
    for block in base.layers:
        block.register_forward_hook(lambda _, args, output: blocks.append((args[0], output)))
    output = model(make_ids(3, 20), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert all(states.shape == (3, 20, 32) for states in output.hidden_states)
    assert torch.equal(output.hidden_states[0], blocks[0][0])
    assert torch.equal(output.hidden_states[1], blocks[0][1])
    assert torch.equal(output.hidden_states[2], base.norm(blocks[1][1]))  # the last one as the head reads it
    assert torch.equal(output.hidden_states[0], base.embed_tokens(make_ids(3, 20)) + base.embed_positions.weight[:20])
    if model_class is HfGPTModel:
        assert torch.equal(output.hidden_states[2], output.last_hidden_state)
    assert len(output.attentions) == 2
    for weights in output.attentions:
        assert weights.shape == (3, 4, 20, 20)
        assert (weights.triu(1) == 0).all()
        assert_close(weights.sum(-1), torch.ones(3, 4, 20), **CLOSE)
    silent = model(make_ids(3, 20))
    assert silent.hidden_states is None
    assert silent.attentions is None
    assert torch.equal(model(make_ids(3, 20), return_dict=False)[0], silent[0])


def test_logits_can_be_limited_to_some_positions(model):
    ids = make_ids(3, 20)
    logits = model(ids).logits
    # The multiplication has fewer rows, so the result is close, not equal.
    assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:], **CLOSE)
    assert_close(model(ids, logits_to_keep=5).logits, logits[:, -5:], **CLOSE)
    kept = torch.tensor([2, 19, 7])
    assert_close(model(ids, logits_to_keep=kept).logits, logits[:, kept], **CLOSE)


def test_embeddings_can_replace_ids_but_not_accompany_them(model):
    ids = make_ids(3, 20)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("rows", ["plain", "padded", "packed", "prepared mask"])
def test_attention_on_short_rows_in_bfloat16_is_trained_in_float32(rows, tiny_config, monkeypatch):
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config())
    ids = torch.randint(64, (2, 12))
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    if rows == "padded":
        inputs["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)
    if rows == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    if rows == "prepared mask":
        hidden = torch.full((12, 12), -1e9).triu(1)
        inputs["attention_mask"] = hidden.expand(2, 1, 12, 12)
    calls, attend = [], modeling_hfgpt.attend_in_float32
    monkeypatch.setattr(modeling_hfgpt, "attend_in_float32", lambda *a, **k: calls.append(1) or attend(*a, **k))

    def train(precision: str, short_row: int = 256) -> torch.Tensor:
        monkeypatch.setattr(modeling_hfgpt, "SHORT_ROW", short_row)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            model(**inputs).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact = train("float32")
    usual = train("bfloat16", short_row=11)
    assert not calls
    faster = train("bfloat16")
    assert len(calls) == model.config.num_hidden_layers
    assert (faster - exact).norm() < 1.1 * (usual - exact).norm() < 0.05 * exact.norm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    assert len(calls) == model.config.num_hidden_layers
