"""Recipes: those of the package run as their headers say, and every error names the key, the line and a remedy.

All comparisons are exact: values with their types, and our own messages verbatim.
"""

import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from hfgpt.errors import InputError
from hfgpt.recipe import (
    OPTIONAL,
    SECTIONS,
    _build_parser,
    first_difference,
    load_recipe,
    parse_sections,
    recipe_folder,
    recipe_names,
    render_recipe,
    section_types,
)
from hfgpt.training.arguments import FROM_SCRATCH, LEARNED

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"), key=lambda path: path.stem)
PRETRAIN = section_types("pretrain")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes r.yaml to the working directory, which is otherwise empty."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "r.yaml"

    return write


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load_recipe(name, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def arguments_of(recipe) -> dict:
    """Every argument of every section, as plain values."""
    values = {
        section: dict(vars(getattr(recipe, section)))
        for section in SECTIONS[recipe.task]
        if getattr(recipe, section) is not None
    }
    values["training"] = recipe.training.to_dict()
    return values


# The recipes of the package


def test_there_are_recipes():
    assert len(RECIPES) >= 4
    assert [path.stem for path in RECIPES] == recipe_names()
    assert recipe_folder() == RECIPES[0].parent


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_package_parses(path):
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe.training.output_dir == f"runs/{path.stem}"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recipe.task == written.pop("task")
    for section, content in written.items():
        for key, value in content.items():
            got = getattr(getattr(recipe, section), key)
            assert getattr(got, "value", got) == value, f"{section}.{key}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_names_the_purpose_the_command_and_the_hardware(path):
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))[0]
    assert re.match(r"# [A-Z].{30}", header), "the first line says what the recipe is for"
    assert re.search(r"^# Hardware: .", header, re.MULTILINE)
    assert "see recipes/README.md" in header or "Not yet run to completion" in header
    # Text after two spaces explains the command.
    commands = re.findall(r"^#   (?:accelerate .*?-m )?(hfgpt .*?)(?:  .*)?$", header, re.MULTILINE)
    assert commands
    for command in commands:
        program, train, name, *overrides = shlex.split(command)
        assert (program, train, name) == ("hfgpt", "train", path.stem)
        recipe = load_recipe(name, overrides)
        for key, value in zip(overrides[::2], overrides[1::2], strict=True):
            section, name = key.removeprefix("--").split(".")
            assert getattr(getattr(recipe, section), name) == value


# Values


@pytest.mark.parametrize("text", ["task: pretrain\n", "data: {}\n"])
def test_unset_keys_have_their_defaults(text, write):
    recipe = load_recipe(write(text))
    assert (recipe.name, recipe.task) == ("r", "pretrain")
    for section, kind in PRETRAIN.items():
        if section != "training":
            assert getattr(recipe, section) == (None if section in OPTIONAL else kind())
    assert recipe.training.to_dict() == PRETRAIN["training"](output_dir="runs/r", **FROM_SCRATCH).to_dict()
    # The parser is cached across recipes; its defaults must not change.
    recipe.evaluation.prompts.append("kept by nobody")
    assert load_recipe("r.yaml").evaluation.prompts == []


SCHEDULE = ("learning_rate", "num_train_epochs", "warmup_steps")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("task: pretrain\n", [], (1e-3, 10, 0.05)),
        ("task: pretrain\nmodel: {preset: gpt2}\n", [], (1e-3, 10, 0.05)),
        ("task: pretrain\nmodel: {path: x}\n", [], (5e-5, 3, 0)),
        ("task: pretrain\n", ["--model.path", "x"], (5e-5, 3, 0)),
        ("task: classify\n", [], (1e-3, 10, 0.05)),
        ("task: classify\npretraining: {max_steps: 5}\n", [], (5e-5, 3, 0)),
        ("task: classify\n", ["--pretraining.max_steps", "5"], (5e-5, 3, 0)),
        ("task: instruct\nmodel: {path: x}\n", [], (5e-5, 3, 0)),
        ("training: {num_train_epochs: 3, warmup_steps: 0}\n", ["--training.learning_rate=5e-5"], (5e-5, 3, 0)),
        ("training: {num_train_epochs: 3}\n", ["--training.learning_rate", "2e-4"], (2e-4, 3, 0.05)),
    ],
)
def test_new_and_trained_weights_have_different_learning_rates(text, overrides, expected, write):
    recipe = load_recipe(write(text), overrides)
    assert tuple(getattr(recipe.training, name) for name in SCHEDULE) == expected
    again = load_recipe(write(render_recipe(recipe))).training
    assert tuple(getattr(again, name) for name in SCHEDULE) == expected


def test_recipes_of_the_package_set_keys_whose_default_differs_for_new_weights():
    for path in RECIPES:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        model, training = written.get("model", {}), written["training"]
        if "path" not in model:
            assert {"preset", "num_hidden_layers"} & model.keys(), path.stem
            assert (
                "preset" in model or {"hidden_size", "num_attention_heads", "max_position_embeddings"} <= model.keys()
            )
            assert {"learning_rate", "warmup_steps"} <= training.keys()
            assert {"num_train_epochs", "max_steps"} & training.keys()


OVERRIDES = [
    (["--training.learning_rate", "6e-4"], 6e-4),
    (["--training.adam_epsilon=1E-7"], 1e-7),
    (["--training.weight_decay", "1"], 1.0),
    (["--training.max_steps", "-1"], -1),
    (["--training.seed=5", "--training.seed=6"], 6),
    (["--training.output_dir", "here/there"], "here/there"),
    (["--training.lr_scheduler_kwargs", "{min_lr_rate: 0.1}"], {"min_lr_rate": 0.1}),
    (["--model.tie_word_embeddings", "false"], False),
    (["--model.qkv_bias=true"], True),
    (["--data.document_boundaries", "true"], True),
    (["--data.block_size", "null"], None),
    (["--tokenizer.pad_token", "null"], None),
    (["--data.name", "1.0"], "1.0"),
    (["--data.path=a=b c"], "a=b c"),
    (["--data.text_column", "käse"], "käse"),
    (["--evaluation.prompts", '["one, two", ""]'], ["one, two", ""]),
]


def test_overrides_take_precedence(write):
    text = "data: {path: x, block_size: 8}\ntraining: {max_steps: 3, logging_steps: 7}\nevaluation: {prompts: [a]}\n"
    plain = arguments_of(load_recipe(write(text)))
    recipe = load_recipe("r.yaml", [word for words, _ in OVERRIDES for word in words])
    arguments = arguments_of(recipe)
    for override, value in OVERRIDES:
        section, key = override[0].removeprefix("--").partition("=")[0].split(".")
        got = getattr(getattr(recipe, section), key)
        assert (got, type(got)) == (value, type(value)), override
        del arguments[section][key], plain[section][key]
    assert arguments == plain, "nothing else has changed"
    assert plain["training"]["logging_steps"] == 7


def test_floats_are_read_in_common_notations(write):
    """YAML 1.1 reads 6e-4 as a string."""
    recipe = load_recipe(write("training: {learning_rate: 6e-4, adam_epsilon: 1E-7, weight_decay: 1}\n"))
    assert (recipe.training.learning_rate, recipe.training.adam_epsilon, recipe.training.weight_decay) == (
        6e-4,
        1e-7,
        1,
    )


def test_sections_without_a_recipe():
    sections = parse_sections(["--data.path", "x", "--evaluation.stride=4"], "pretrain", ["data", "evaluation"])
    assert sections == {"data": PRETRAIN["data"](path="x"), "evaluation": PRETRAIN["evaluation"](stride=4)}
    for override, message in (
        ("--training.seed=1", "there is no section 'training' (available: data, evaluation)"),
        ("--data.pth=1", "there is no key 'pth' in section 'data'; did you mean 'path'?"),
        ("--data.stride=x", "data.stride is 'x'; it must be an integer or null"),
    ):
        with pytest.raises(InputError) as error:
            parse_sections([override], "pretrain", ["data", "evaluation"])
        assert str(error.value) == message


# Back to YAML

ODD = """
tokenizer: {pad_token: null, kind: char}
model: {preset: gpt2, qkv_bias: false, embd_pdrop: 0, layer_norm_eps: 1e-6}
data: {path: "null", name: "1.0", train_split: "no", text_column: "täxt: {", block_size: 8}
training:
  save_strategy: "no"
  save_total_limit: null
  disable_tqdm: null
  learning_rate: 1e-9
  lr_scheduler_type: cosine_with_min_lr
  lr_scheduler_kwargs: {min_lr_rate: 0.1}
  optim: adamw_torch
  report_to: [none]
evaluation: {prompts: ["", "\\n a\\t", "# no comment", "äß€\U0001f600", "[x]"], top_k: 0}
"""


@pytest.mark.parametrize("name", [*recipe_names(), "odd"])
def test_a_rendered_recipe_gives_the_same_run(name, write, tmp_path):
    recipe = load_recipe(write(ODD) if name == "odd" else name)
    assert arguments_of(recipe)["training"]["output_dir"] == f"runs/{'r' if name == 'odd' else name}"
    rendered = render_recipe(recipe)
    again = load_recipe(write(rendered))
    assert arguments_of(again) == arguments_of(recipe)
    assert again.values == recipe.values
    assert render_recipe(again) == rendered
    assert first_difference(recipe.values, again.values) is None


def test_a_rendered_recipe_has_what_differs_and_our_own_defaults(write):
    values = load_recipe(write("task: pretrain\ntraining: {seed: 42, max_steps: 2, save_steps: 7}\n")).values
    assert list(values) == ["task", *(section for section in PRETRAIN if section not in OPTIONAL)]
    others = {key: value for key, value in values["training"].items() if key not in LEARNED}
    assert others == {"output_dir": "runs/r", "save_steps": 7.0}
    unset = {field.name for field in fields(PRETRAIN["data"]) if field.default is None}
    assert unset
    assert set(values["data"]) == {field.name for field in fields(PRETRAIN["data"])} - unset


LOADED = "model: {path: x}\ntokenizer: {kind: char}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            LOADED,
            [],
            "r.yaml, line 2: tokenizer.kind is 'char', but the tokenizer is loaded from model.path: remove one of "
            "them",
        ),
        (
            LOADED,
            ["--model.path", "y", "--tokenizer.vocab_size=9"],
            "tokenizer.vocab_size is 9, but the tokenizer is loaded from model.path: remove one of them",
        ),
        (
            "tokenizer: {path: y, vocab_size: 9}\n",
            [],
            "r.yaml, line 1: tokenizer.vocab_size is 9, but the tokenizer is loaded from tokenizer.path: remove one "
            "of them",
        ),
        (
            "model: {path: x}\n",
            ["--tokenizer.pad_token", "null"],
            "tokenizer.pad_token is None, but the tokenizer is loaded from model.path: remove one of them",
        ),
    ],
)
def test_options_for_training_a_tokenizer_are_refused_where_one_is_loaded(text, overrides, message, write):
    with pytest.raises(InputError) as error:
        load_recipe(write(text), overrides)
    assert str(error.value) == message


def test_a_recipe_with_a_loaded_tokenizer_has_no_options_for_training_one(write):
    trained = {"kind", "vocab_size", "max_train_characters", "pad_token"}
    assert load_recipe(write("data: {path: x}\n")).values["tokenizer"].keys() == trained
    assert load_recipe(write("model: {path: x}\n")).values["tokenizer"] == {}
    assert "initialization" not in load_recipe("r.yaml").values["model"]
    # The recipe's keys are dropped if an override sets the tokenizer path.
    values = load_recipe(write("tokenizer: {kind: char, pad_token: <p>}\n"), ["--tokenizer.path", "y"]).values
    assert values["tokenizer"] == {"path": "y", "pad_token": "<p>"}


def test_a_rendered_recipe_is_complete_even_if_defaults_change(write, monkeypatch):
    recipe = load_recipe(write("task: classify\nmodel: {path: x}\ntraining: {max_steps: 2}\n"))
    written = yaml.safe_load(render_recipe(recipe))["training"]
    assert set(LEARNED) < written.keys()
    assert written["bf16"] is recipe.training.bf16 is not None, "resolved for this machine"
    for name, value in (("learning_rate", 5e-5), ("per_device_train_batch_size", 8), ("weight_decay", 0.0),
                        ("lr_scheduler_type", "linear"), ("adam_beta2", 0.999), ("optim", "adamw_torch_fused"),
                        ("muon_learning_rate", None), ("train_sampling_strategy", "group_by_length"),
                        ("max_steps", 2), ("num_train_epochs", 3.0), ("seed", 42)):  # fmt: skip
        assert (name in written, written[name]) == (True, value)
    write(render_recipe(recipe))

    @dataclass
    class Changed(section_types("classify")["training"]):
        learning_rate: float = 1.0
        muon_learning_rate: float | None = 0.5
        adam_beta2: float = 0.5

    monkeypatch.setitem(section_types("classify"), "training", Changed)
    _build_parser.cache_clear()
    again, fresh = load_recipe("r.yaml"), load_recipe(write("task: classify\nmodel: {path: x}\n"))
    _build_parser.cache_clear()
    assert again.values == recipe.values
    assert (again.training.learning_rate, again.training.muon_learning_rate) == (5e-5, None)
    assert (fresh.training.learning_rate, fresh.training.muon_learning_rate) == (1.0, 0.5)


def test_a_run_of_a_version_that_wrote_no_defaults_can_be_resumed(write):
    new = load_recipe(write("task: classify\nmodel: {path: x}\ntraining: {max_steps: 2}\n")).values
    old = {**new, "training": {"output_dir": "runs/r", "max_steps": 2}}
    assert first_difference(old, new) is None
    for key, value in (("learning_rate", 1e-3), ("lr_scheduler_type", "cosine"), ("muon_learning_rate", 0.1)):
        changed = {**new, "training": {**new["training"], key: value}}
        assert first_difference(old, changed)[0] == f"training.{key}"


def test_a_run_can_be_resumed_if_only_logging_or_evaluation_differs(write):
    old = load_recipe(write("data: {path: x}\n")).values
    for key, value, differs in (
        ("training.logging_steps", 3, False),
        ("training.save_total_limit", 5, False),
        ("training.eval_strategy", "steps", False),
        ("training.bf16", True, False),  # compared as resolved for the machine
        ("training.per_device_eval_batch_size", 2, False),
        ("training.dataloader_num_workers", 2, False),
        ("training.run_name", "again", False),
        ("evaluation.prompts", ["x"], False),
        ("evaluation.stride", 8, False),
        ("data.num_proc", 2, False),
        ("data.cache_dir", "there", False),
        ("training.seed", 7, True),
        ("training.max_steps", 7, True),
        ("tokenizer.pad_token", None, True),
        ("model.path", "x", True),
        ("data.stride", 3, True),
    ):
        section, name = key.split(".")
        new = {**old, section: {**old[section], name: value}}
        before = old[section].get(name)
        assert first_difference(old, new) == ((key, before, value) if differs else None)
        assert first_difference(new, old) == ((key, value, before) if differs else None)
        assert first_difference(old, new, ignoring=[key]) is None
    assert first_difference(old, {**old, "task": "classify"}) == ("task", "pretrain", "classify")


# Errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle:\n  path: x\n", "line 1: there is no section 'modle'; did you mean 'model'?"),
        ("task: pretrain\n\nxyz: 1\n", f"line 3: there is no section 'xyz' (available: task, {', '.join(PRETRAIN)})"),
        ("max_steps: 3\n", "line 1: there is no section 'max_steps'; did you mean the key 'training.max_steps'?"),
        ("data:\n  path: x\n  strid: 1", "line 3: there is no key 'strid' in section 'data'; did you mean 'stride'?"),
        ("data: {path: x,\n 1: 2}\n", "line 2: there is no key '1' in section 'data'"),
        ("model:\n  preest: x", "line 2: there is no key 'preest' in section 'model'; did you mean 'preset'?"),
        ("model: 3\n", "line 1: 'model' is a section: indent its keys below it"),
        ("task: pretrain\nmodel:\npath: x\n", "line 2: 'model' is a section: indent its keys below it"),
        ("data: [path, x]\n", "line 1: 'data' is a section: indent its keys below it"),
        ("task:\n", "line 1: task cannot be empty"),
        ("task: [pretrain]\n", "line 1: task is ['pretrain']; it must be one of pretrain, classify, instruct"),
        ("task: trian\n", "line 1: task is 'trian'; it must be one of pretrain, classify, instruct"),
        ("data:\n  path: x\n  validation_fraction:\n", "line 3: data.validation_fraction cannot be empty"),
        ("training: {seed: null}\n", "line 1: training.seed cannot be empty"),
        ("data:\n  <<: {text_column: null}\n", "line 1: data.text_column cannot be empty"),
        ("model:\n  hidden_size: wide\n", "line 2: model.hidden_size is 'wide'; it must be an integer or null"),
        ("data: {stride: 1.5}\n", "line 1: data.stride is '1.5'; it must be an integer or null"),
        ("data: {document_boundaries: 1}\n", "line 1: data.document_boundaries is '1'; it must be true or false"),
        ("training:\n  learning_rate: 1.0.0\n", "line 2: training.learning_rate is '1.0.0'; it must be a number"),
        ("training:\n  save_strategy: no\n", "line 2: training.save_strategy is 'False'; it must be text in quotes"),
        (
            "training:\n  save_strategy: \"'no'\"\n",
            "line 2: training.save_strategy is \"'no'\"; did you mean 'no'?",
        ),
        ("data:\n  name: 1.0\n", "line 2: data.name is '1.0'; it must be text in quotes or null"),
        (
            "data:\n  mixture: [{path: a, wieght: 1}]\n",
            "line 2: data.mixture: there is no key 'wieght' in an entry; did you mean 'weight'?",
        ),
        ("data: {mixture: [{weight: 1}]}\n", "line 1: data.mixture: an entry does not have path"),
        (
            "data: {mixture: [{path: a, weight: heavy}]}\n",
            "line 1: data.mixture: weight is 'heavy'; it must be a number",
        ),
        (
            "data: {mixture: [{path: a, weight: 0}]}\n",
            "line 1: data.mixture has the weight 0.0 for a; it must be above 0",
        ),
        ("evaluation:\n  prompts: One\n", "line 2: evaluation.prompts is 'One'; it must be a list like [a, b]"),
        ("evaluation:\n  prompts: [One, 2]\n", "line 2: evaluation.prompts is '2'; it must be text in quotes"),
        (
            "data: {sample_by: row}",
            "line 1: data.sample_by is 'row'; it must be one of 'document', 'paragraph', 'line'",
        ),
        ("data:\n  path: x\n\ndata:\n  path: y\n", "line 4: data is already set in line 1: remove one"),
        ("data:\n  path: x\n  name: z\n  path: y\n", "line 4: data.path is already set in line 2: remove one"),
        ("training:\n  eval_strategy: stpes\n", "line 2: training.eval_strategy is 'stpes'; did you mean 'steps'?"),
        ("training: {optim: adamw_torhc}", "line 1: training.optim is 'adamw_torhc'; did you mean 'adamw_torch'?"),
        ("data: [\n", "line 2: invalid YAML: expected the node content, but found '<stream end>'"),
        ("data:\n\tpath: x\n", "line 2: invalid YAML: found character '\\t' that cannot start any token"),
        ("data: {path: !run x}\n", "line 1: invalid YAML: could not determine a constructor for the tag '!run'"),
        ("task: a\n---\ntask: b\n", "line 2: invalid YAML: but found another document"),
    ],
)
def test_an_error_names_the_line_the_key_and_a_remedy(text, message, write):
    assert refusal(write(text)) == f"r.yaml, {message}"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "pretrain\n", "- task\n"])
def test_a_file_without_a_recipe(text, write):
    assert refusal(write(text)) == "r.yaml is not a recipe: it must be a mapping with a task and sections"


def test_a_file_that_is_not_text(write):
    assert (
        refusal(write(b"data:\n  path: caf\xe9\n"))
        == "r.yaml is not valid UTF-8: byte 0xe9 at offset 17; convert it to UTF-8"
    )
    message = refusal(write(b"data:\n  path: \0\n"))
    assert message.startswith("r.yaml: invalid YAML: unacceptable character #x0000")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: " + "[" * 1100 + "]" * 1100, " is nested too deeply, or has an alias (*) inside its own anchor (&)"),
        ("data: &a\n  path: *a\n", " is nested too deeply, or has an alias (*) inside its own anchor (&)"),
        ("evaluation:\n  prompts: &a [*a]\n", " is nested too deeply, or has an alias (*) inside its own anchor (&)"),
        *(
            (
                f"l0: &l0 {start}\n" + "".join(f"l{i}: &l{i} {level(i - 1)}\n" for i in range(1, 30)),
                ": invalid YAML: more than 10,000 keys and list items, including those of each alias (*)",
            )
            for start, level in (
                ("[lol]", lambda i: f"[*l{i}, *l{i}]"),
                ("{a: lol}", lambda i: f"{{a: *l{i}, b: *l{i}}}"),
                ("{a: lol}", lambda i: f"{{<<: [*l{i}, *l{i}]}}"),
            )
        ),
        ("training:\n  seed: " + "9" * 5000, ": invalid YAML: Exceeds the limit"),
        ("training:\n  seed: 2020-99-99\n", ": invalid YAML: month must be in 1..12"),
    ],
    ids=["deep", "self", "self-list", "lists", "mappings", "merges", "digits", "date"],
)
def test_recursive_or_unreadable_yaml_is_a_one_line_error(text, message, write):
    refused = refusal(write(text))
    assert refused.startswith(f"r.yaml{message}")
    assert "\n" not in refused


def test_aliases_are_read(write):
    recipe = load_recipe(write("model:\n  num_hidden_layers: &n 3\n  num_attention_heads: *n\n"))
    assert (recipe.model.num_hidden_layers, recipe.model.num_attention_heads) == (3, 3)


def test_a_value_refused_only_by_transformers(write):
    message = refusal(write("training:\n  optim: adam_but_better_than_all\n"))
    assert message.startswith(
        "r.yaml, line 2: training.optim is 'adam_but_better_than_all'; it must be one of adamw_torch"
    )
    both = "training: {load_best_model_at_end: true, eval_strategy: epoch, save_strategy: steps}\n"
    message = refusal(write(both))
    assert message.startswith(
        "r.yaml, line 1: training.load_best_model_at_end: --load_best_model_at_end requires the save and eval strategy"
    )
    assert message.endswith("- Save strategy: SaveStrategy.STEPS")


NUMBERS = [
    ("max_steps: 0", "max_steps is 0; it must be at least 1, or -1 to train for num_train_epochs"),
    ("max_steps: -2", "max_steps is -2; it must be at least 1, or -1 to train for num_train_epochs"),
    ("num_train_epochs: -1", "num_train_epochs is -1.0; it must be above 0"),
    ("learning_rate: -1", "learning_rate is -1.0; it must be finite and at least 0"),
    ("learning_rate: .nan", "learning_rate is nan; it must be finite and at least 0"),
    ("muon_learning_rate: -0.1", "muon_learning_rate is -0.1; it must be finite and at least 0"),
    ("weight_decay: -0.1", "weight_decay is -0.1; it must be finite and at least 0"),
    ("warmup_steps: -1", "warmup_steps is -1.0; it must be finite and at least 0"),
    ("max_grad_norm: -1", "max_grad_norm is -1.0; it must be finite and at least 0"),
    ("adam_beta2: 1", "adam_beta2 is 1.0; it must be at least 0 and below 1"),
    ("adam_epsilon: -1e-8", "adam_epsilon is -1e-08; it must be finite and at least 0"),
    ("label_smoothing_factor: 1.5", "label_smoothing_factor is 1.5; it must be at least 0 and below 1"),
    ("logging_steps: 0", "logging_steps is 0.0; it must be above 0"),
    ("save_steps: 0", "save_steps is 0.0; it must be above 0"),
    ("save_total_limit: 0", "save_total_limit is 0; it must be at least 1"),
    ("gradient_accumulation_steps: 0", "gradient_accumulation_steps is 0; it must be at least 1"),
    ("seed: -1", "seed is -1; it must be at least 0 and below 4294967296"),
]


@pytest.mark.parametrize(("text", "message"), NUMBERS, ids=lambda text: text)
def test_an_invalid_number_that_transformers_accepts_is_refused_with_its_key_and_line(text, message, write):
    assert refusal(write(f"training:\n  {text}\n")) == f"r.yaml, line 2: training.{message}"
    key, value = text.split(": ")
    assert refusal("r.yaml", f"--training.{key}={value}") == f"training.{message}", "the line has another value"


def test_errors_in_numbers_of_the_first_pass_name_its_section(write):
    for text, message in (
        ("max_steps: 0", "max_steps is 0; it must be at least 1"),
        ("max_steps: -1", "max_steps is -1; it must be at least 1"),
        ("learning_rate: -1", "learning_rate is -1.0; it must be finite and at least 0"),
        ("dropout: 1", "dropout is 1.0; it must be at least 0 and below 1"),
    ):
        recipe = write(f"task: classify\npretraining: {{{text}}}\n")
        assert refusal(recipe) == f"r.yaml, line 2: pretraining.{message}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--modle.path", "x"], "there is no section 'modle'; did you mean 'model'?"),
        (["--model.hiden_size=3"], "there is no key 'hiden_size' in section 'model'; did you mean 'hidden_size'?"),
        (["--data.path.x=3"], "there is no key 'path.x' in section 'data'; did you mean 'path'?"),
        (["--data", "x"], "--data is a section: set one of its keys, as in --data.key value"),
        (["--training.max_steps", "many"], "training.max_steps is 'many'; it must be an integer"),
        (["--training.learning_rate", "null"], "training.learning_rate is 'None'; it must be a number"),
        (["--model.qkv_bias=maybe"], "model.qkv_bias is 'maybe'; it must be true or false or null"),
        (["--task", "x"], "task is 'x'; it must be one of pretrain, classify, instruct"),
        (["--training.eval_strategy=epohc"], "training.eval_strategy is 'epohc'; did you mean 'epoch'?"),
        (["data.path=x"], "unrecognized arguments: data.path=x; overrides must have the form --section.key value"),
        (["-x"], "unrecognized arguments: -x; overrides must have the form --section.key value"),
        (
            ["--data.path"],
            "argument --data.path: expected one argument; overrides must have the form --section.key value",
        ),
    ],
)
def test_an_error_in_an_override_has_no_line_number(overrides, message, write):
    write("training:\n  eval_strategy: steps\n")
    assert refusal("r.yaml", *overrides) == message


def test_a_missing_recipe(write, tmp_path):
    write("task: pretrain\n")
    (tmp_path / "folder.yaml").mkdir()
    assert refusal("shakespear-char") == (
        "the recipe 'shakespear-char' does not exist; did you mean 'shakespeare-char'?"
    )
    assert refusal("r") == "the recipe 'r' does not exist; did you mean 'r.yaml'?"
    assert refusal("zzz") == "the recipe 'zzz' does not exist; hfgpt recipes lists the recipes"
    assert refusal("rr.yaml") == "the recipe file 'rr.yaml' does not exist (nearest: r.yaml): check the path"
    assert refusal("no/where.yaml") == "the recipe file 'no/where.yaml' does not exist: check the path"
    assert refusal("folder.yaml") == "recipe 'folder.yaml' is a folder: give a .yaml file in it"


def test_a_folder_does_not_hide_a_recipe_of_the_same_name(write, tmp_path):
    (tmp_path / "demo").mkdir()
    assert load_recipe("demo").values == load_recipe(str(RECIPES[0])).values
    (tmp_path / "mine").write_text("data: {path: x}\n")
    assert load_recipe("mine").training.output_dir == "runs/mine", "a file needs no suffix"
