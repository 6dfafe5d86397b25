"""Muon for the hidden matrices, AdamW for everything else, as one optimizer for Trainer.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Loshchilov and Hutter,
"Decoupled Weight Decay Regularization" (2019).
"""

from collections import defaultdict

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hfgpt.errors import InputError
from hfgpt.training.hardware import has_native_bf16
from hfgpt.training.sharding import gather_whole, shard_like

LARGE_MATRIX = 2**17  # elements


class Muon(torch.optim.Muon):
    """torch.optim.Muon, but orthogonalizing in float32 on hardware that emulates bfloat16, and in batches on CPUs.

    torch.optim.Muon converts each gradient to bfloat16. On a processor without native bfloat16, its products take
    about twenty times as long as in float32, and longer than the training step itself. On a CPU, orthogonalizing small
    matrices of the same shape as a batch takes half the time. Everything else (momentum, state, hyperparameters) is
    torch's.

    A sharded matrix is orthogonalized whole, in every process; its momentum stays sharded.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done = {}
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None and not is_faster_alone(parameter):
                    # Only one matrix at a time is gathered, since the whole model may not fit in memory.
                    key = parameter if isinstance(parameter, DTensor) else parameter.shape
                    by_shape[key].append(parameter)
            for parameters in by_shape.values():
                self._step_together(parameters, group)
                done |= {parameter: parameter.grad for parameter in parameters}
        for parameter in done:  # so that torch's step leaves it out
            parameter.grad = None
        super().step()
        for parameter, gradient in done.items():
            parameter.grad = gradient
        return loss

    def _step_together(self, parameters: list[torch.Tensor], group: dict):
        """One step for parameters of the same shape (rows, columns)."""
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
            updates.append(gather_whole(update))
        updates = torch.stack(updates)
        if has_native_bf16(updates.device):
            updates = updates.bfloat16()
        updates = orthogonalize(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameters[0].shape
        ratio = max(1, rows / columns) ** 0.5
        if group["adjust_lr_fn"] == "match_rms_adamw":
            ratio = 0.2 * max(rows, columns) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(shard_like(update.to(parameter.dtype), parameter), alpha=-group["lr"] * ratio)


def is_faster_alone(matrix: torch.Tensor) -> bool:
    """Whether torch's own step, for one matrix after the other in bfloat16, is the fastest."""
    is_native = has_native_bf16(matrix.device) and not isinstance(matrix, DTensor)
    return is_native and (matrix.device.type != "cpu" or matrix.numel() >= LARGE_MATRIX)


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Moves the singular values of each matrix (n, rows, columns) close to 1 with Newton-Schulz iterations."""
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # the iteration converges below a spectral norm of one
    if x.shape[-1] < 2 * x.shape[-2] or x.dtype == torch.bfloat16:  # in which the other products lose precision
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x
    # Same result in fewer operations: each step multiplies x by a polynomial of its Gram matrix, which is small here.
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = identity.expand_as(gram)
    for _ in range(steps):
        polynomial = torch.baddbmm(a * identity, gram, gram, alpha=c).add_(gram, alpha=b)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return x.mT if tall else x


class MuonWithAdamW(torch.optim.Optimizer):
    """Combines two optimizers into one: the parameter groups of both, one state, one step."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})
        self._share()

    def _share(self):
        """Makes both optimizers use the parameter groups and state of this one, which are saved and loaded."""
        groups = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:groups], self.param_groups[groups:]
        self.muon.state = self.adamw.state = self.state

    def step(self, closure=None):
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict):
        super().load_state_dict(state_dict)
        self._share()


def hidden_matrix_names(model: nn.Module) -> set[str]:
    """Names of the trainable weights of linear layers in the blocks, which Muon is designed for."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if ".layers." in f".{name}" and isinstance(module, nn.Linear) and module.weight.requires_grad
    }


class MuonFactory:
    """Trainer's interface for custom optimizers: constructed without arguments, called with the model."""

    def __call__(
        self,
        model: nn.Module,
        *,
        decay_names: set[str],
        muon_learning_rate: float,
        muon_momentum: float,
        weight_decay: float,
        **adamw_arguments,
    ) -> MuonWithAdamW:
        """Builds the optimizer.

        Args:
            model: Model whose trainable parameters are optimized.
            decay_names: AdamW parameters with weight decay; all hidden matrices have it.
            muon_learning_rate, muon_momentum: For the hidden matrices.
            weight_decay: For both optimizers.
            adamw_arguments: Other arguments of `torch.optim.AdamW`, including `lr`.
        """
        hidden = hidden_matrix_names(model)
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        rest = {name: parameter for name, parameter in trainable.items() if name not in hidden}
        matrices = [trainable[name] for name in trainable if name in hidden]
        if not matrices:
            raise InputError("training.muon_learning_rate is set, but no matrix in the blocks is trained: unset it")
        muon = Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay, momentum=muon_momentum)
        groups = [
            {"params": [p for name, p in rest.items() if name in decay_names], "weight_decay": weight_decay},
            {"params": [p for name, p in rest.items() if name not in decay_names], "weight_decay": 0.0},
        ]
        # With an adapter, all trainable parameters may be hidden matrices; AdamW needs at least one group, even empty.
        adamw = torch.optim.AdamW([group for group in groups if group["params"]] or groups[:1], **adamw_arguments)
        return MuonWithAdamW(muon, adamw)
