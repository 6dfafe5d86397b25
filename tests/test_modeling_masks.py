"""Which tokens attend to which: padding, packed documents, and agreement of the attention implementations.

The reference is always a single row or document. `CLOSE`: float32 sums over rows of another width are computed in
another order, which changes these logits, of about 5 at most, by up to 2e-6; one token too many changes them by 0.01
or more (`test_the_tolerance_tells_right_from_wrong`). Gradients, sums over all tokens, are about 10, so
`CLOSE_GRADIENTS` is ten times as wide.
"""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from hfgpt import HfGPTForCausalLM, modeling_hfgpt
from hfgpt.modeling_hfgpt import find_packed_documents

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CLOSE_GRADIENTS = {"atol": 1e-4, "rtol": 1e-4}
IMPLEMENTATIONS = ["sdpa", "eager"]


@pytest.fixture(params=IMPLEMENTATIONS)
def model(request, tiny_config):
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config()).eval()
    model.set_attn_implementation(request.param)
    return model


def make_rows(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, (length,), generator=generator) for length in lengths]


def pad(rows: list[torch.Tensor], side: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, width); the padding consists of real tokens, so that attending to it changes the logits."""
    ids = torch.randint(1, 64, (len(rows), width), generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        missing = width - len(row)
        start = {"left": missing, "right": 0, "both": missing // 2}[side]
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
    return ids, mask


def alone(model, rows: list[torch.Tensor]) -> torch.Tensor:
    """The concatenated logits (tokens, V) of each row computed alone."""
    return torch.cat([model(row.unsqueeze(0)).logits[0] for row in rows])


def gradients(model, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a sum of the logits (tokens, V), each with a different weight."""
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).roll(17, 0)
    model.zero_grad()
    (weights * logits).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def check_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    for name in expected:
        assert_close(actual[name], expected[name], **CLOSE_GRADIENTS, msg=lambda text, name=name: f"{name}: {text}")


# Implementations


def test_eager_and_sdpa_agree(tiny_config):
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config())
    ids, mask = pad(make_rows(20, 7, 13), "left", 20)
    for attention_mask in (None, mask):
        results = []
        for implementation in IMPLEMENTATIONS:
            model.set_attn_implementation(implementation)
            logits = model(ids, attention_mask=attention_mask).logits[mask.bool()]
            results.append((logits, gradients(model, logits)))
        assert_close(results[0][0], results[1][0], **CLOSE)
        check_gradients(results[0][1], results[1][1])


def test_the_tolerance_separates_right_from_wrong(model):
    """The least sensitive of 20 tokens: every wrong mask or position below has a larger error than this."""
    row = make_rows(20)[0]
    logits = model(row.unsqueeze(0)).logits[0]
    without_the_first = model(row[1:].unsqueeze(0), position_ids=torch.arange(1, 20).unsqueeze(0)).logits[0]
    one_further = model(row.unsqueeze(0), position_ids=torch.arange(1, 21).unsqueeze(0)).logits[0]
    for wrong in (without_the_first, one_further[1:]):
        assert (wrong - logits[1:]).abs().amax(-1).min() > 0.01


def test_tokens_do_not_see_the_future(model):
    row = make_rows(20)[0]
    for length in (1, 7, 19):
        assert_close(alone(model, [row[:length]]), model(row.unsqueeze(0)).logits[0, :length], **CLOSE)


# Padding


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padded_rows_give_the_same_logits_as_alone(side, dtype, model):
    rows = make_rows(9, 1, 4, 12)
    ids, mask = pad(rows, side, 12)
    logits = model(ids, attention_mask=mask.to(dtype)).logits
    assert_close(logits[mask.bool()], alone(model, rows), **CLOSE)
    assert logits.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_gradients(side, model):
    rows = make_rows(9, 1, 4, 12)
    ids, mask = pad(rows, side, 14)  # including a column that is padding in every row
    expected = gradients(model, alone(model, rows))
    check_gradients(gradients(model, model(ids, attention_mask=mask).logits[mask.bool()]), expected)


def test_a_gap_in_the_mask_is_like_removing_the_token(model):
    rows = make_rows(20, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, [3, 4, 11]] = 0
    mask[1, [0, 7, 19]] = 0
    logits = model(torch.stack(rows), attention_mask=mask).logits
    assert_close(
        logits[mask.bool()], alone(model, [row[m.bool()] for row, m in zip(rows, mask, strict=True)]), **CLOSE
    )


def test_a_mask_that_hides_nothing_changes_nothing(model):
    ids = torch.stack(make_rows(20, 20))
    assert_close(model(ids, attention_mask=torch.ones(2, 20)).logits, model(ids).logits, **CLOSE)


def test_a_prepared_4d_mask_is_used_unchanged(model):
    """(B, 1, T, T), added to the scores: here each token attends to itself and the previous one."""
    ids = make_rows(20)[0].unsqueeze(0)
    seen = torch.ones(20, 20).tril().triu(-1).bool()
    mask = torch.zeros(1, 1, 20, 20).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits = model(ids, attention_mask=mask).logits
    assert_close(logits[:, :2], model(ids[:, :2]).logits, **CLOSE)
    assert (logits[:, 2:] - model(ids).logits[:, 2:]).abs().amax(-1).min() > 0.01


# Packed documents


def pack(documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat(documents), torch.cat([torch.arange(len(document)) for document in documents])


BOUNDARIES = [(5, 1, 8, 1, 1, 4), (11, 9)]


@pytest.fixture
def packed():
    """Documents, ids (2, 20) and positions (2, 20) of two rows with different boundaries."""
    rows = [make_rows(*lengths, seed=number) for number, lengths in enumerate(BOUNDARIES)]
    ids, positions = zip(*map(pack, rows), strict=True)
    return [document for row in rows for document in row], torch.stack(ids), torch.stack(positions)


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("mask", [None, "ones", "left", "right"])
def test_packed_documents_give_the_same_logits_as_alone(mask, use_cache, model, packed):
    documents, ids, positions = packed
    assert model.config.use_cache
    if mask is None:
        attention_mask, real = None, torch.ones_like(ids, dtype=torch.bool)
    elif mask == "ones":
        attention_mask = torch.ones_like(ids)
        real = attention_mask.bool()
    else:
        ids, attention_mask = pad(list(ids), mask, 26)
        real = attention_mask.bool()
        # Positions at padding must not matter; collators write zeros.
        positions = torch.zeros_like(ids).masked_scatter(real, positions)
    output = model(ids, attention_mask=attention_mask, position_ids=positions, use_cache=use_cache)
    assert_close(output.logits[real], alone(model, documents), **CLOSE)
    assert output.past_key_values is None


@pytest.mark.parametrize("filler", [1, 7, "counting"])
def test_positions_at_padding_do_not_matter(filler, model, packed):
    documents, ids, positions = packed
    ids, mask = pad(list(ids), "right", 26)
    filled = torch.full_like(ids, filler) if filler != "counting" else torch.arange(26).expand(2, -1)
    positions = filled.masked_scatter(mask.bool(), positions)
    assert_close(
        model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()], alone(model, documents), **CLOSE
    )


@pytest.mark.parametrize("padded", [False, True])
def test_packed_documents_have_their_own_gradients(padded, model, packed):
    documents, ids, positions = packed
    expected = gradients(model, alone(model, documents))
    mask = torch.ones_like(ids)
    if padded:
        ids, mask = pad(list(ids), "right", 26)
        positions = torch.zeros_like(ids).masked_scatter(mask.bool(), positions)
    check_gradients(gradients(model, model(ids, mask, positions, use_cache=False).logits[mask.bool()]), expected)


def test_one_row_of_positions_applies_to_the_batch(model, packed):
    _, ids, positions = packed
    logits = model(ids, position_ids=positions[:1]).logits
    assert_close(logits, model(ids, position_ids=positions[:1].expand(2, -1)).logits, **CLOSE)
    documents = [document for row in ids for document in row.split(BOUNDARIES[0])]
    assert_close(logits.flatten(0, 1), alone(model, documents), **CLOSE)


def test_a_document_may_start_at_any_position(model):
    """Two parts of longer documents: positions do not start at 0, and the second part starts at a higher one."""
    ids = make_rows(20)[0].unsqueeze(0)
    positions = torch.cat([torch.arange(3, 15), torch.arange(20, 28)]).unsqueeze(0)
    parts = [model(ids[:, part], position_ids=positions[:, part]).logits for part in (slice(12), slice(12, 20))]
    assert_close(model(ids, position_ids=positions).logits, torch.cat(parts, dim=1), **CLOSE)


def test_rows_of_one_document_can_be_cached(model):
    ids, mask = pad(make_rows(9, 12), "left", 12)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate writes them
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    assert output.past_key_values.get_seq_length() == 12
    assert_close(output.logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()], **CLOSE)


def test_packed_documents_with_a_cache_are_refused(model, packed):
    _, ids, positions = packed
    for cache in (DynamicCache(config=model.config), model(ids[:, :4]).past_key_values):
        length = cache.get_seq_length()
        for attention_mask in (None, torch.ones(2, length + 20)):
            with pytest.raises(ValueError, match=r"packed documents.*use_cache=False.*past_key_values"):
                model(ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache)
            assert cache.get_seq_length() == length


def test_flash_attention_refuses_packing_it_cannot_separate(tiny_config, packed):
    """Set by hand: the error must come before the kernel, which is not installed."""
    _, ids, positions = packed
    model = HfGPTForCausalLM(tiny_config()).eval()
    model.config._attn_implementation = "flash_attention_2"
    message = "flash attention separates packed documents only in a batch of one row without padding"
    with pytest.raises(ValueError, match=message):
        model(ids, position_ids=positions)
    with pytest.raises(ValueError, match=message):
        model(ids[:1], attention_mask=(torch.arange(20) < 18).unsqueeze(0), position_ids=positions[:1])


def test_flash_attention_gets_the_positions_of_one_packed_row(tiny_config, packed, monkeypatch):
    """Without a mask it separates documents by positions: this checks the arguments of transformers' kernel."""
    _, ids, positions = packed
    model = HfGPTForCausalLM(tiny_config()).eval()
    model.config._attn_implementation = "flash_attention_2"
    given = []

    def kernel(module, query, key, value, attention_mask, **kwargs):
        given.append((attention_mask, kwargs["position_ids"]))
        return value.transpose(1, 2), None

    monkeypatch.setattr(modeling_hfgpt.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: kernel)
    for mask in (None, torch.ones(1, 20)):
        given.clear()
        model(ids[:1], attention_mask=mask, position_ids=positions[:1])
        assert len(given) == 2
        for attention_mask, position_ids in given:
            assert attention_mask is None
            assert torch.equal(position_ids, positions[:1])


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([[0, 1, 2, 3]], None, None),
        ([[5, 6, 7, 8]], None, None),
        ([[0, 1, 0, 1]], None, [[0, 0, 1, 1]]),
        ([[0, 0, 0, 1]], None, [[0, 1, 2, 2]]),
        ([[0, 1, 2, 3], [0, 1, 2, 0]], None, [[0, 0, 0, 0], [0, 0, 0, 1]]),
        # Padding on the left, on the right, within, and everywhere is not a separate document.
        ([[0, 0, 0, 1]], [[0, 0, 1, 1]], None),
        ([[1, 1, 0, 1]], [[0, 0, 1, 1]], None),
        ([[0, 1, 0, 0]], [[1, 1, 0, 0]], None),
        ([[0, 9, 1, 2]], [[1, 0, 1, 1]], None),
        ([[0, 1, 9, 0]], [[1, 1, 0, 1]], [[0, 0, 0, 1]]),
        ([[0, 0, 0, 0]], [[0, 0, 0, 0]], None),
    ],
)
def test_documents_are_separated_by_positions(positions, mask, expected):
    documents = find_packed_documents(torch.tensor(positions), None if mask is None else torch.tensor(mask))
    assert (documents if documents is None else documents.tolist()) == expected
