"""Python for the card: how to load a model, and how to use it, where hfgpt is not installed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from hfgpt.hub.folder import FolderRecords

AUTO_CLASSES = {"classify": "ForSequenceClassification", None: "ForCausalLM"}
PIPELINES = {"classify": "text-classification", None: "text-generation"}


def pipeline_tag(records: FolderRecords) -> str:
    """The Hub's name of what the model does."""
    return PIPELINES.get(records.task, PIPELINES[None])


WIDTH = 120
NEW_TOKENS = 64  # in the example of a model without a recipe


@dataclass(frozen=True)
class Place:
    """Where a model is loaded from.

    Args:
        name: A folder or a repository.
        revision: A branch of the repository; None: main.
        native: Whether the weights there are in GPT-2's own layout, which needs no code of ours.
    """

    name: str
    revision: str | None = None
    native: bool = False

    @classmethod
    def of_folder(cls, folder: Path, native: bool = False) -> "Place":
        """A folder as its own card names it: below the working directory by its path from there, elsewhere by its
        name, so that no path of this machine is on the card."""
        folder, here = folder.resolve(), Path.cwd()
        is_below = folder != here and folder.is_relative_to(here)
        return cls(folder.relative_to(here).as_posix() if is_below else folder.name, native=native)

    @property
    def options(self) -> str:
        """The arguments that loading needs beside the name, each with a comma before it."""
        revision = f", revision={_quote(self.revision)}" if self.revision else ""
        return revision + ("" if self.native else ", trust_remote_code=True")


def loading_code(records: FolderRecords, place: Place) -> str:
    """Three lines that load a model and its tokenizer; four for an adapter."""
    imports, assignments = _load(records, place)
    return "\n".join([*imports, *assignments])


def usage_code(records: FolderRecords, place: Place) -> str:
    """Python that loads a model and uses it."""
    if not records.has_tokenizer:
        return loading_code(records, place) + "\nprint(model)"
    imports, assignments = ["from transformers import pipeline"], []
    pipeline = f'pipe = pipeline("{pipeline_tag(records)}", model={_quote(place.name)}{place.options})'
    if records.adapter:
        imports, assignments = _load(records, place)
        imports[-1] += ", pipeline"
        pipeline = f'pipe = pipeline("{pipeline_tag(records)}", model=model, tokenizer=tokenizer)'
    call = ", ".join([_example(records), *(f"{key}={value!r}" for key, value in _options(records).items())])
    return "\n".join([*imports, "", *assignments, pipeline, f"print(pipe({call}))"])


def _load(records: FolderRecords, place: Place) -> tuple[list[str], list[str]]:
    """The lines that import and those that assign."""
    model_class = "AutoModel" + AUTO_CLASSES.get(records.task, AUTO_CLASSES[None])
    classes = ""
    tokenizer = ["AutoTokenizer"] if records.has_tokenizer else []
    if records.adapter:
        model_class = model_class.replace("AutoModel", "AutoPeftModel")
        names = [f"{index}: {_quote(str(label))}" for index, label in records.labels.items()]
        classes = f", id2label={{{', '.join(names)}}}" if names else ""
        imports = [f"from peft import {model_class}", *(f"from transformers import {name}" for name in tokenizer)]
    else:
        imports = [f"from transformers import {', '.join([model_class, *tokenizer])}"]
    arguments = f"{_quote(place.name)}{classes}{place.options}"
    load = f"model = {model_class}.from_pretrained({arguments})"
    assignments = [load if len(load) < WIDTH else f"model = {model_class}.from_pretrained(\n    {arguments}\n)"]
    if tokenizer:
        # AutoTokenizer reads config.json first, and asks before it runs the code named there; an adapter has none.
        options = replace(place, native=True).options if records.adapter else place.options
        assignments.append(f"tokenizer = AutoTokenizer.from_pretrained({_quote(place.name)}{options})")
    return imports, assignments


def _prompt(records: FolderRecords) -> str:
    return next(filter(None, records.prompts), "The")


def _example(records: FolderRecords) -> str:
    prompt = _quote(_prompt(records))
    return f'[{{"role": "user", "content": {prompt}}}]' if records.task == "instruct" else prompt


def _quote(text: str) -> str:
    """A string as Python writes it, in double quotes where no character needs another escape than JSON's."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)


def _options(records: FolderRecords) -> dict[str, object]:
    """How the recipe had the model write, with no more new tokens than the context surely has room for."""
    if records.task == "classify":
        return {}
    evaluation = records.recipe.get("evaluation", {})
    new_tokens = evaluation.get("max_new_tokens", NEW_TOKENS)
    if context := (records.run.architecture or {}).get("max_position_embeddings"):
        # A token is at least a byte of the prompt; how many those of a conversation are is the chat template's matter.
        taken = context // 2 if records.task == "instruct" else len(_prompt(records).encode(errors="replace"))
        new_tokens = max(1, min(new_tokens, context - taken))
    if records.task == "instruct":
        return {"max_new_tokens": new_tokens, "do_sample": False}
    sampling = {name: evaluation[name] for name in ("temperature", "top_k") if name in evaluation}
    return {"do_sample": True, "max_new_tokens": new_tokens} | sampling
