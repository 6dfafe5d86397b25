"""Muon equals torch's Muon, gets the right matrices, and is restored exactly from a checkpoint."""

import io
import re

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hfgpt.training import optimizers
from hfgpt.training.optimizers import Muon, MuonFactory, MuonWithAdamW, hidden_matrix_names, orthogonalize

SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8), (1, 12)]  # tall, wide, square, tall again (one batch), a single row
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
HIDDEN = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(up|down)_proj)\.weight")
OPTIONS = [
    {},
    {"nesterov": False},
    {"weight_decay": 0.0, "momentum": 0.5},
    {"adjust_lr_fn": "original"},
    {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
]


def step_both(options: dict, steps: int = 4) -> tuple[list[nn.Parameter], list[nn.Parameter], list[torch.Tensor]]:
    """Parameters after some steps of our Muon and torch's, with the same initial values and gradients."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    optimizer = Muon(ours, lr=0.1, **options)
    reference = torch.optim.Muon(theirs, lr=0.1, **options)
    for step in range(steps):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            # A parameter without a gradient is not changed, like the last one in the first step.
            if step or index < len(SHAPES) - 1:
                mine.grad = torch.randn(mine.shape, generator=generator)
                other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    return ours, theirs, start


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_muon_computes_torchs_update_in_float32(options, monkeypatch):
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda device: False)
    # torch's own code, kept in float32; a clone, since the conversion to bfloat16 copies, too.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    ours, theirs, start = step_both(options)
    for mine, other, before in zip(ours, theirs, start, strict=True):
        assert (other - before).abs().max() > 0.05
        # Same operations in another order: 1e-7 per rounding, at most a few hundred of them in five iterations.
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_muon_is_close_to_torchs_bfloat16(options, monkeypatch):
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda device: False)
    ours, theirs, start = step_both(options)
    for mine, other, before in zip(ours, theirs, start, strict=True):
        # bfloat16 rounds by 2^-9 = 0.2 %, and the iterations amplify that for the small singular values.
        assert torch.linalg.norm(mine - other) < 0.05 * torch.linalg.norm(other - before)


@pytest.mark.parametrize("large", [0, 200, 1000])
def test_muon_is_torchs_for_large_matrices_where_bfloat16_is_native(large, monkeypatch):
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda device: True)
    monkeypatch.setattr(optimizers, "LARGE_MATRIX", large)
    batches, step = [], Muon._step_together
    monkeypatch.setattr(Muon, "_step_together", lambda self, *args: batches.append(len(args[0])) or step(self, *args))
    for mine, other, before in zip(*step_both({}), strict=True):
        assert torch.linalg.norm(mine - other) < 0.05 * torch.linalg.norm(other - before)
        if mine.numel() >= large:
            assert torch.equal(mine, other)
    # In each of four steps, a batch of two, one or two others, and the single row, which has no gradient in the first.
    assert len(batches) == {0: 0, 200: 4 * 2 + 3, 1000: 4 * 3 + 3}[large]
    assert batches.count(2) == (4 if large else 0)


def test_a_step_leaves_the_gradients(monkeypatch):
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda device: True)
    monkeypatch.setattr(optimizers, "LARGE_MATRIX", 100)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((4, 4), (16, 16))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    Muon(parameters, lr=0.1).step()
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in parameters)


def test_muon_calls_the_closure_once(monkeypatch):
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda device: False)
    weight = nn.Parameter(torch.eye(4))
    calls = []

    def closure():
        calls.append(1)
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Muon([weight], lr=0.1).step(closure).item() == 4
    assert len(calls) == 1
    assert not torch.equal(weight, torch.eye(4))


@pytest.mark.parametrize("shape", [(3, 20, 8), (3, 8, 20), (3, 12, 12)], ids=["tall", "wide", "square"])
def test_orthogonalize_keeps_directions_and_evens_out_singular_values(shape):
    torch.manual_seed(0)
    smaller = min(shape[1:])
    left = torch.linalg.qr(torch.randn(shape[0], shape[1], smaller, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(shape[0], shape[2], smaller, dtype=torch.float64))[0]
    values = torch.logspace(-1.5, 0.5, smaller, dtype=torch.float64)  # a range of 1 to 100
    matrices = left * values @ right.mT
    # In the directions of the singular vectors the result is diagonal, up to float64 rounding.
    found = left.mT @ orthogonalize(matrices, COEFFICIENTS, 5, 1e-7) @ right
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, torch.diag_embed(diagonal), rtol=0, atol=1e-10)
    # Jordan et al. tuned the coefficients so that values end up between about 0.7 and 1.2.
    assert diagonal.min() > 0.65
    assert diagonal.max() < 1.25


def test_orthogonalizing_zeros_gives_zeros():
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4), COEFFICIENTS, 5, 1e-7), torch.zeros(1, 4, 4))


def names_by_optimizer(model: nn.Module, optimizer: MuonWithAdamW) -> tuple[list[str], dict[str, float]]:
    """Names of Muon's parameters, and of AdamW's with their weight decay, including duplicates."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon = [names[id(p)] for group in optimizer.muon.param_groups for p in group["params"]]
    adamw = [(names[id(p)], group["weight_decay"]) for group in optimizer.adamw.param_groups for p in group["params"]]
    assert len(adamw) == len(dict(adamw))
    together = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(together) == sorted(muon + list(dict(adamw)))
    return muon, dict(adamw)


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": False}, {"qkv_bias": False}], ids=["tied", "untied", "no qkv bias"]
)
def test_each_parameter_is_in_the_right_optimizer_once(fields, make_model, make_trainer):
    model = make_model(**fields)
    optimizer = make_trainer(model, muon_learning_rate=0.02, weight_decay=0.1).create_optimizer()
    muon, adamw = names_by_optimizer(model, getattr(optimizer, "optimizer", optimizer))
    parameters = [name for name, _ in model.named_parameters()]
    assert muon == [name for name in parameters if HIDDEN.fullmatch(name)]
    assert len(muon) == 2 * 6
    assert adamw.keys() == {name for name in parameters if not HIDDEN.fullmatch(name)}
    assert ("lm_head.weight" in adamw) == (not model.config.tie_word_embeddings)
    # As everywhere in transformers, embeddings and heads decay, biases and norms do not.
    assert adamw == {name: 0.0 if "bias" in name or "norm" in name else 0.1 for name in adamw}


def test_trainer_passes_the_arguments_on(make_model, make_trainer):
    optimizer = make_trainer(
        make_model(),
        muon_learning_rate=0.03,
        muon_momentum=0.8,
        learning_rate=0.002,
        weight_decay=0.3,
        adam_beta1=0.7,
        adam_beta2=0.6,
        adam_epsilon=1e-3,
    ).create_optimizer()
    both = getattr(optimizer, "optimizer", optimizer)
    (muon,) = both.muon.param_groups
    assert (muon["lr"], muon["momentum"], muon["weight_decay"], muon["nesterov"]) == (0.03, 0.8, 0.3, True)
    for group in both.adamw.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.002, (0.7, 0.6), 1e-3)


def test_frozen_parameters_are_in_no_group(make_model, make_trainer):
    model = make_model()
    frozen = {"model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.bias"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_trainer(model, muon_learning_rate=0.02).create_optimizer()
    muon, adamw = names_by_optimizer(model, getattr(optimizer, "optimizer", optimizer))
    assert {*muon, *adamw} == {name for name, _ in model.named_parameters()} - frozen
    assert "model.layers.0.mlp.up_proj.weight" not in hidden_matrix_names(model)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    unchanged = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert unchanged == frozen


def build_optimizer(model: nn.Module) -> MuonWithAdamW:
    decay = {name for name, _ in model.named_parameters() if "norm" not in name}
    rates = {"muon_learning_rate": 0.05, "muon_momentum": 0.9, "lr": 0.01}
    return MuonFactory()(model, decay_names=decay, weight_decay=0.1, fused=True, **rates)


def train_steps(model: nn.Module, optimizer: MuonWithAdamW, steps: range):
    for step in steps:
        ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_all_trained_parameters_may_be_matrices(make_model):
    """As with an adapter: then no parameters are left for AdamW."""
    model = make_model().requires_grad_(False)
    (name, *_) = [name for name, _ in model.named_parameters() if name.endswith("up_proj.weight")]
    before = model.get_parameter(name).requires_grad_(True).detach().clone()
    optimizer = build_optimizer(model)
    train_steps(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert not torch.equal(model.get_parameter(name), before)


def test_resuming_from_a_state_dict_is_bit_identical(make_model):
    straight, stopped = make_model(), make_model()
    train_steps(straight, build_optimizer(straight), range(6))
    optimizer = build_optimizer(stopped)
    train_steps(stopped, optimizer, range(3))
    state = optimizer.state_dict()
    # The standard format of torch optimizers, which FSDP and distributed checkpoints rely on.
    assert state.keys() == {"state", "param_groups"}
    indices = [index for group in state["param_groups"] for index in group["params"]]
    assert sorted(indices) == sorted(state["state"]) == list(range(len(list(stopped.parameters()))))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed = make_model()
    resumed.load_state_dict(stopped.state_dict())
    optimizer = build_optimizer(resumed)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train_steps(resumed, optimizer, range(3, 6))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    # The groups that a scheduler writes to are those the two optimizers read, also after loading.
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    train_steps(resumed, optimizer, range(6, 7))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


class RatesSeen(TrainerCallback):
    """Records the learning rates of each step, read from the two optimizers."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.rates = {}

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        both = getattr(optimizer, "optimizer", optimizer)
        (muon,) = {group["lr"] for group in both.muon.param_groups}
        (adamw,) = {group["lr"] for group in both.adamw.param_groups}
        self.rates[state.global_step] = (muon, adamw)


def test_trainer_resumes_muon_and_schedules_both(make_model, make_blocks, make_trainer):
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "muon_learning_rate": 0.06,
        "learning_rate": 0.006,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 3,
    }
    seen = RatesSeen()
    full = make_trainer(make_model(), make_blocks(200), callbacks=[seen], **options)
    full.train()
    # Linear from the full rate to zero, up to floating-point rounding.
    for step in range(6):
        assert seen.rates[step] == pytest.approx((0.06 * (6 - step) / 6, 0.006 * (6 - step) / 6), rel=1e-12)
    # Different initial weights would show if training did not continue from the checkpoint.
    resumed = make_trainer(make_model(initializer_range=0.1), make_blocks(200), callbacks=[seen], **options)
    resumed.train(resume_from_checkpoint=f"{full.args.output_dir}/checkpoint-3")
    assert seen.rates.keys() == {3, 4, 5}
    assert seen.rates[5] == pytest.approx((0.01, 0.001), rel=1e-12)
    for name, tensor in full.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
