"""Optimizers of sharded weights, and their states on disk; runs with FSDP are in tests/runs/test_processes.py."""

import copy

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from hfgpt.training import optimizers
from hfgpt.training.optimizers import MuonFactory, MuonWithAdamW
from hfgpt.training.sharding import gather_weights, gather_whole, load_optimizer, save_optimizer


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process, on which tensors are sharded as on many."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def models(make_model, mesh):
    """A model, and a copy of it whose weights are sharded."""
    whole = make_model()
    sharded = copy.deepcopy(whole)
    for name, weight in whole.named_parameters():
        module, _, own = name.rpartition(".")
        shard = DTensor.from_local(weight.detach().clone(), mesh, [Shard(0)])
        setattr(sharded.get_submodule(module), own, torch.nn.Parameter(shard))
    sharded.tie_weights()
    return whole, sharded


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int):
    """Takes a step with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        gradient = torch.randn(weight.shape, generator=generator)
        is_sharded = isinstance(weight, DTensor)
        weight.grad = DTensor.from_local(gradient, weight.device_mesh, [Shard(0)]) if is_sharded else gradient
    optimizer.step()


def build(model: torch.nn.Module) -> MuonWithAdamW:
    settings = {"muon_learning_rate": 0.02, "muon_momentum": 0.9, "weight_decay": 0.1, "lr": 0.01, "fused": True}
    return MuonFactory()(model, decay_names=set(), **settings)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: gather_whole(weight.detach()) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("is_native", [False, True])
def test_an_optimizer_continues_with_its_state_sharded_or_whole(is_native, models, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda device: is_native)
    whole, sharded = models
    tolerance = {"rtol": 0, "atol": 1e-3 if is_native else 1e-6}  # torch's Muon has the precision of bfloat16 there
    first, second = build(whole), build(sharded)
    for model, optimizer in ((whole, first), (sharded, second)):
        train(model, optimizer, seed=1)
    torch.testing.assert_close(weights_of(sharded), weights_of(whole), **tolerance)
    assert all(
        isinstance(state["momentum_buffer"], DTensor) for state in second.muon.state.values() if "step" not in state
    )
    save_optimizer(second, tmp_path / "sharded")
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")

    # Each continues with the state of the other.
    first, second = build(whole), build(sharded)
    load_optimizer(first, tmp_path / "sharded")
    load_optimizer(second, tmp_path)
    for model, optimizer in ((whole, first), (sharded, second)):
        train(model, optimizer, seed=2)
    torch.testing.assert_close(weights_of(sharded), weights_of(whole), **tolerance)
    states = [
        [gather_whole(value) for weight in model.parameters() for value in optimizer.state[weight].values()]
        for model, optimizer in ((whole, first), (sharded, second))
    ]
    torch.testing.assert_close(*states, rtol=0, atol=1e-6)


def test_the_state_of_an_optimizer_can_be_saved_before_its_first_step(models, tmp_path):
    _, sharded = models
    save_optimizer(build(sharded), tmp_path)
    load_optimizer(optimizer := build(sharded), tmp_path)
    assert not optimizer.state


def test_tied_weights_are_gathered_once(models):
    whole, sharded = models
    gathered = gather_weights(sharded)
    assert gathered["lm_head.weight"] is gathered["model.embed_tokens.weight"]
    assert gathered.keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, gathered[name]) for name, tensor in whole.state_dict().items())
