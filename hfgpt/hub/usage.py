"""Python for the card: how to load a model, and how to use it, where hfgpt is not installed."""

from hfgpt.hub.records import Records

AUTO_CLASSES = {"classify": "ForSequenceClassification", None: "ForCausalLM"}
PIPELINES = {"classify": "text-classification", None: "text-generation"}


def pipeline_tag(records: Records) -> str:
    """The Hub's name of what the model does."""
    return PIPELINES.get(records.task, PIPELINES[None])


def loading_code(records: Records, name: str, native: bool = False) -> str:
    """Three lines that load a model and its tokenizer; four for an adapter.

    Args:
        records: Of the model's folder.
        name: Where to load it from: a folder or a repository.
        native: Whether the weights are in GPT-2's own layout, which needs no code of ours.
    """
    imports, assignments = _load(records, name, native)
    return "\n".join([*imports, *assignments])


def usage_code(records: Records, name: str, native: bool = False) -> str:
    """Python that loads a model and uses it; arguments as of `loading_code`."""
    if not records.has_tokenizer:
        return loading_code(records, name, native) + "\nprint(model)"
    trust = "" if native else ", trust_remote_code=True"
    imports, assignments = ["from transformers import pipeline"], []
    pipeline = f'pipe = pipeline("{pipeline_tag(records)}", model="{name}"{trust})'
    if records.adapter:
        imports, assignments = _load(records, name, native)
        imports[-1] += ", pipeline"
        pipeline = f'pipe = pipeline("{pipeline_tag(records)}", model=model, tokenizer=tokenizer)'
    call = ", ".join([_example(records), *(f"{key}={value}" for key, value in _options(records).items())])
    return "\n".join([*imports, "", *assignments, pipeline, f"print(pipe({call}))"])


def _load(records: Records, name: str, native: bool) -> tuple[list[str], list[str]]:
    """The lines that import and those that assign."""
    model_class = "AutoModel" + AUTO_CLASSES.get(records.task, AUTO_CLASSES[None])
    classes, trust = "", "" if native else ", trust_remote_code=True"
    tokenizer = ["AutoTokenizer"] if records.has_tokenizer else []
    if records.adapter:
        model_class = model_class.replace("AutoModel", "AutoPeftModel")
        classes = f", id2label={records.labels}" if records.labels else ""
        imports = [f"from peft import {model_class}", *(f"from transformers import {name}" for name in tokenizer)]
    else:
        imports = [f"from transformers import {', '.join([model_class, *tokenizer])}"]
    assignments = [f'model = {model_class}.from_pretrained("{name}"{classes}{trust})']
    return imports, assignments + [f'tokenizer = AutoTokenizer.from_pretrained("{name}")' for _ in tokenizer]


def _example(records: Records) -> str:
    prompt = repr(next(filter(None, records.prompts), "The"))
    return f'[{{"role": "user", "content": {prompt}}}]' if records.task == "instruct" else prompt


def _options(records: Records) -> dict[str, object]:
    """How the recipe had the model write."""
    evaluation = records.recipe.get("evaluation", {})
    if records.task == "instruct":
        return {"max_new_tokens": evaluation["max_new_tokens"], "do_sample": False}
    if records.task == "pretrain":
        return {"do_sample": True} | {name: evaluation[name] for name in ("max_new_tokens", "temperature", "top_k")}
    return {}
