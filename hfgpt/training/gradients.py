"""Sums of gradients that do not depend on the number of processes, on a CPU.

The sum of floating-point numbers depends on their order. Here the batches of a step are summed as a binary tree, whose
subtrees the processes compute: 1, 2, 4 or more processes thus train bit-identical weights.
"""

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


class PairwiseSums:
    """Sums the gradients of the batches of a step pairwise, in a process and then among the processes.

    Args:
        model: The model as Trainer runs it; if it is distributed, its gradients are summed by this object.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sums: list[tuple[int, dict[nn.Parameter, torch.Tensor]]] = []  # number of batches, sum of each parameter
        module = getattr(model, "_orig_mod", model)  # of a compiled model
        self.is_distributed = isinstance(module, DistributedDataParallel)
        if self.is_distributed:
            module.register_comm_hook(None, self._reduce)

    def clear(self):
        """Forgets the batches of a step that was interrupted."""
        self.sums.clear()

    def add(self, is_last: bool):
        """Adds the gradients of a batch; after the last one of a step, the sum is in the parameters."""
        if not is_last:
            self._set_aside()
            return
        if not self.is_distributed:  # otherwise already added during the backward pass
            for parameter in self.parameters:
                self._add_earlier(parameter)
        self.sums.clear()

    def _set_aside(self):
        count, total = 1, {parameter: parameter.grad for parameter in self.parameters if parameter.grad is not None}
        while self.sums and self.sums[-1][0] == count:
            _, earlier = self.sums.pop()
            for parameter, gradient in earlier.items():
                total[parameter] = gradient + total[parameter] if parameter in total else gradient
            count *= 2
        self.sums.append((count, total))
        for parameter in self.parameters:
            parameter.grad = None

    def _add_earlier(self, parameter: nn.Parameter):
        for _, earlier in reversed(self.sums):
            if parameter in earlier:
                gradient = earlier[parameter]
                parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad

    def _reduce(self, state: None, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The mean over all processes of the gradients in a bucket of DistributedDataParallel."""
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            for _, earlier in reversed(self.sums):
                if parameter in earlier:
                    gradient.add_(earlier[parameter])
        reduced = torch.futures.Future()
        reduced.set_result(sum_pairwise(bucket.buffer()).div_(distributed.get_world_size()))
        return reduced


def sum_pairwise(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place; pairwise if their number is a power of two."""
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    if processes & (processes - 1):
        distributed.all_reduce(tensor)
        return tensor
    other, distance = torch.empty_like(tensor), 1
    while distance < processes:
        partner = rank ^ distance
        sent = distributed.isend(tensor, partner)
        distributed.recv(other, partner)
        sent.wait()
        tensor += other
        distance *= 2
    return tensor
