"""The sequence classifier: which token it reads, and its losses.

`CLOSE`: float32 sums over rows of another width are computed in another order, which changes these logits, of about 1,
by up to 1e-6; reading a neighboring token gives logits that are off by 0.01 or more.
"""

import pytest
import torch
from torch.testing import assert_close

from hfgpt import HfGPTForSequenceClassification

CLOSE = {"atol": 5e-6, "rtol": 5e-6}
PAD = 63


def build(tiny_config, **overrides):
    torch.manual_seed(0)
    overrides = {"num_labels": 5, "pad_token_id": PAD, **overrides}
    return HfGPTForSequenceClassification(tiny_config(**overrides)).eval()


@pytest.fixture
def model(tiny_config):
    return build(tiny_config)


def make_rows(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, PAD, (length,), generator=generator) for length in lengths]


def pad(rows: list[torch.Tensor], side: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in rows]
    ids = torch.stack(
        [torch.nn.functional.pad(row, sides, value=PAD) for row, sides in zip(rows, missing, strict=True)]
    )
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(row), sides) for row, sides in zip(rows, missing, strict=True)]
    )
    return ids, mask


def alone(model, rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(row.unsqueeze(0)).logits for row in rows])


# The token that is classified


def test_logits_are_the_head_over_the_last_token(model):
    row = make_rows(9)[0].unsqueeze(0)
    states = model.model(row).last_hidden_state
    assert_close(model(row).logits, states[:, -1] @ model.score.weight.T, **CLOSE)
    wrong = states[:, :-1] @ model.score.weight.T
    assert (wrong - model(row).logits).abs().amax(-1).min() > 0.01


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_the_same_logits_as_alone(side, implementation, model):
    model.set_attn_implementation(implementation)
    rows = make_rows(9, 1, 4, 12)
    expected = alone(model, rows)
    for width in (12, 15):
        ids, mask = pad(rows, side, width)
        for attention_mask in (mask, mask.bool()):
            assert_close(model(ids, attention_mask=attention_mask).logits, expected, **CLOSE)
        # Only the mask matters, whatever the ids of padding.
        assert_close(model(ids.masked_fill(mask == 0, 7), attention_mask=mask).logits, expected, **CLOSE)
        embeddings = model.get_input_embeddings()(ids)
        assert_close(model(inputs_embeds=embeddings, attention_mask=mask).logits, expected, **CLOSE)


def test_the_mask_takes_precedence_over_the_pad_token(model):
    """A text may end with the token used for padding, as with GPT-2."""
    row = make_rows(9)[0]
    row[-2:] = PAD
    ones = torch.ones(1, 9)
    states = model.model(row.unsqueeze(0)).last_hidden_state
    assert_close(model(row.unsqueeze(0), attention_mask=ones).logits, states[:, -1] @ model.score.weight.T, **CLOSE)


def test_without_a_mask_trailing_pad_tokens_are_padding(model):
    rows = make_rows(9, 1, 4, 12)
    rows[0][3] = PAD  # within the text: treated as text
    ids, _ = pad(rows, "right", 14)
    assert_close(model(ids).logits, alone(model, rows), **CLOSE)


def test_without_mask_and_pad_token_the_last_token_is_read(tiny_config):
    model = build(tiny_config, pad_token_id=None)
    ids = torch.stack(make_rows(9, 9))
    states = model.model(ids).last_hidden_state
    assert_close(model(ids).logits, states[:, -1] @ model.score.weight.T, **CLOSE)
    embeddings = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits, **CLOSE)


def test_a_row_of_only_padding_is_refused(model):
    ids, mask = pad(make_rows(9, 4), "right", 9)
    mask[1] = 0
    with pytest.raises(ValueError, match="has only padding"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="has only padding"):
        model(torch.full((1, 4), PAD))


def test_a_cached_text_is_classified_by_its_new_last_token(model):
    ids, mask = pad(make_rows(12, 7), "left", 12)
    cache = model(ids[:, :8], attention_mask=mask[:, :8]).past_key_values
    logits = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    assert_close(logits, model(ids, attention_mask=mask).logits, **CLOSE)


# Losses


def test_single_label_loss(model):
    ids, mask = pad(make_rows(9, 1, 4), "right", 9)
    labels = torch.tensor([4, 0, 2])
    output = model(ids, attention_mask=mask, labels=labels)
    expected = -output.logits.double().log_softmax(-1)[torch.arange(3), labels].mean()
    assert_close(output.loss.double(), expected, **CLOSE)
    assert model.config.problem_type == "single_label_classification"
    assert model(ids, attention_mask=mask).loss is None
    # Trainer's gradient accumulation: the sum divided by the number of items of the entire step.
    output = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=12)
    assert_close(output.loss.double(), expected * 3 / 12, **CLOSE)


def test_multi_label_loss(tiny_config):
    model = build(tiny_config)
    ids, mask = pad(make_rows(9, 1, 4), "right", 9)
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    output = model(ids, attention_mask=mask, labels=labels)
    probabilities = output.logits.double().sigmoid()
    expected = -torch.where(labels.bool(), probabilities, 1 - probabilities).log().mean()
    assert_close(output.loss.double(), expected, **CLOSE)
    assert model.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("num_labels", [1, 5])
def test_regression_loss(num_labels, tiny_config):
    model = build(tiny_config, num_labels=num_labels, problem_type="regression" if num_labels > 1 else None)
    ids, mask = pad(make_rows(9, 1, 4), "right", 9)
    labels = torch.randn((3, 5) if num_labels > 1 else (3,), generator=torch.Generator().manual_seed(2))
    output = model(ids, attention_mask=mask, labels=labels)
    assert output.logits.shape == (3, num_labels)
    expected = (output.logits.double() - labels.view(3, num_labels)).pow(2).mean()
    assert_close(output.loss.double(), expected, **CLOSE)
    assert model.config.problem_type == "regression"


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_of_a_batch_equal_those_of_its_rows(side, model):
    rows, labels = make_rows(9, 1, 4, 12), torch.tensor([4, 0, 2, 1])
    sum(
        model(row.unsqueeze(0), labels=label.view(1)).loss / 4 for row, label in zip(rows, labels, strict=True)
    ).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    ids, mask = pad(rows, side, 14)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    for name, weight in model.named_parameters():
        assert_close(weight.grad, expected[name], **CLOSE, msg=name)


def test_head_is_saved_and_loaded_with_its_labels(model, tmp_path):
    model.config.id2label = dict(enumerate(["one", "two", "three", "four", "five"]))
    model.save_pretrained(tmp_path)
    loaded = HfGPTForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.num_labels == loaded.score.out_features == 5
    assert loaded.config.id2label[4] == "five"
    ids = torch.stack(make_rows(9, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
