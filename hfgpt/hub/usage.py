"""Code for the card: how to load, use and serve the model without hfgpt."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from hfgpt.hub.folder import FolderRecords
from hfgpt.records import KnownAnswers

WIDTH = 120
NEW_TOKENS = 64  # in the example for a model without a recipe


def pipeline_tag(records: FolderRecords) -> str:
    """The Hub's name for the model's task."""
    return "text-classification" if records.task == "classify" else "text-generation"


@dataclass(frozen=True)
class Place:
    """Where a model is loaded from.

    Args:
        name: A folder or a repository.
        revision: A branch of the repository; None: main.
        native: Whether it is a standard transformers GPT-2, which does not need custom code.
    """

    name: str
    revision: str | None = None
    native: bool = False

    @classmethod
    def of_folder(cls, folder: Path, native: bool = False) -> "Place":
        """A local folder for its own card, without an absolute path.

        It is named relative to the working directory, or by its last part if it is not inside.
        """
        folder, here = folder.resolve(), Path.cwd()
        is_below = folder != here and folder.is_relative_to(here)
        return cls(folder.relative_to(here).as_posix() if is_below else folder.name, native=native)

    @property
    def options(self) -> str:
        """The arguments of `from_pretrained` after the name, each with a leading comma."""
        revision = f", revision={_quote(self.revision)}" if self.revision else ""
        return revision + ("" if self.native else ", trust_remote_code=True")


def loading_code(records: FolderRecords, place: Place) -> str:
    """Python code that loads a model and its tokenizer."""
    imports, assignments = _load(records, place)
    return "\n".join([*imports, *assignments])


def usage_code(records: FolderRecords, place: Place) -> str:
    """Python code that loads a model and uses it."""
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


def verifying_code(records: FolderRecords, place: Place) -> str:
    """Python code that compares the `pipe` of `usage_code` with known answers, see `hfgpt.known_answers`."""
    revision = f", revision={_quote(place.revision)}" if place.revision else ""
    found, expected = "logits.softmax(-1)", "probabilities"
    if records.task != "classify":
        found = 'logits.log_softmax(-1)[answer["positions"]].gather(-1, torch.tensor(answer["top_ids"]))'
        expected = "log_probabilities"
    return f"""\
import json
import torch
from transformers.utils import cached_file

with open(cached_file({_quote(place.name)}, "{KnownAnswers.FILE}"{revision}), encoding="utf-8") as file:
    known = json.load(file)
limit, difference = known["limits"][str(pipe.model.dtype).removeprefix("torch.")], 0.0
for answer in known["answers"].values():
    ids = pipe.tokenizer(answer["text"])["input_ids"]
    assert ids == answer["ids"], "another tokenizer"
    with torch.no_grad():
        logits = pipe.model(input_ids=torch.tensor([ids], device=pipe.device)).logits[0].double().cpu()
    found = {found}
    expected = torch.tensor(answer["{expected}"], dtype=torch.float64)
    difference = max((found - expected).abs().max().item(), difference)  # NaN comes first, and stays
    assert difference <= limit, f"the largest difference is {{difference:.1e}}, and at most {{limit:.1e}} is rounding"
print(f"verified: this is the model measured on {{known['measured']}}; largest difference {{difference:.1e}}")"""


def serving_command(records: FolderRecords, place: Place) -> str | None:
    """The shell command that serves a model with vLLM; None: it does not run there as it is."""
    if records.adapter or not records.has_tokenizer or (place.native and records.task == "classify"):
        return None
    # vLLM has a class for the head of classifiers only with hfgpt's plugin, which trusts the code.
    options = [] if place.native or records.task == "classify" else ["--trust-remote-code"]
    options += ["--revision", place.revision] if place.revision else []
    options += ["--pooler-config", '{"seq_pooling_type": "LAST"}'] if records.task == "classify" else []
    return shlex.join(["vllm", "serve", place.name, *options, "--dtype", "float32"])


def _load(records: FolderRecords, place: Place) -> tuple[list[str], list[str]]:
    """The import lines and the lines that load."""
    model_class = "AutoModelForSequenceClassification" if records.task == "classify" else "AutoModelForCausalLM"
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
        # AutoTokenizer reads config.json first and asks before it runs code named there; an adapter does not have one.
        options = replace(place, native=True).options if records.adapter else place.options
        assignments.append(f"tokenizer = AutoTokenizer.from_pretrained({_quote(place.name)}{options})")
    return imports, assignments


def _prompt(records: FolderRecords) -> str:
    return next(filter(None, records.prompts), "The")


def _example(records: FolderRecords) -> str:
    prompt = _quote(_prompt(records))
    return f'[{{"role": "user", "content": {prompt}}}]' if records.task == "instruct" else prompt


def _quote(text: str) -> str:
    """A Python string literal, in double quotes if JSON's escapes are enough."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)


def _options(records: FolderRecords) -> dict[str, object]:
    """The recipe's generation settings, with no more new tokens than fit in the context."""
    if records.task == "classify":
        return {}
    evaluation = records.recipe.get("evaluation", {})
    new_tokens = evaluation.get("max_new_tokens", NEW_TOKENS)
    if context := (records.run.architecture or {}).get("max_position_embeddings"):
        # Each token takes at least one byte of the prompt. How many a chat template adds is unknown.
        taken = context // 2 if records.task == "instruct" else len(_prompt(records).encode(errors="replace"))
        new_tokens = max(1, min(new_tokens, context - taken))
    if records.task == "instruct":
        return {"max_new_tokens": new_tokens, "do_sample": False}
    sampling = {name: evaluation[name] for name in ("temperature", "top_k") if name in evaluation}
    return {"do_sample": True, "max_new_tokens": new_tokens} | sampling
