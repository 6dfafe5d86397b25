"""The plugin of vLLM, which loads it wherever hfgpt is installed: its models need no `--trust-remote-code`."""


def register():
    """Registers the models; the entry point `vllm.general_plugins`, called in each of vLLM's processes."""
    from vllm import ModelRegistry

    # By name, since vLLM imports its models only after it has started its processes.
    ModelRegistry.register_model("HfGPTForCausalLM", "hfgpt.serving.vllm_models:TransformersForCausalLM")
    ModelRegistry.register_model(
        "HfGPTForSequenceClassification", "hfgpt.serving.vllm_models:TransformersForSequenceClassification"
    )
