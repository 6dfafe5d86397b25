"""hfgpt's models in vLLM: its Transformers backend, which runs the model's own code, with corrections.

The classes have the names of vLLM's, by which vLLM recognizes this backend.
"""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import transformers as backend
from vllm.model_executor.models.utils import WeightsMapper


class TransformersForCausalLM(backend.TransformersForCausalLM):
    """The language model; never generates the `suppress_tokens` of generation_config.json, which vLLM does not read.

    These are the ids without a token, where `pad_vocab_to_multiple_of` rounded the vocabulary up.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        generation = vllm_config.model_config.try_get_generation_config() or {}
        self.suppressed = generation.get("suppress_tokens") or []

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The logits (T, V) of hidden states (T, C); None in processes that do not sample."""
        logits = super().compute_logits(hidden_states)
        if logits is not None and self.suppressed:
            logits[:, self.suppressed] = -torch.inf
        return logits


class TransformersForSequenceClassification(backend.TransformersForSequenceClassification):
    """The classifier: the head is a linear layer with the name `score`, and reads the last token.

    vLLM's own class looks for its weights as `classifier`, adds a dimension, and reads the first token by default.
    """

    default_seq_pooling_type = "LAST"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_prefix={"score.": "classifier."})
        self.classifier.__class__ = torch.nn.Linear
