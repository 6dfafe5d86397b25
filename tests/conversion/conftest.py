"""Fixtures shared by the conversion tests."""

import pytest
import torch
from makers import CONTEXT, VOCAB


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of tokens without padding."""
    return torch.randint(3, VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(5))
