"""Architecture rules, checked in the source: allowed imports, and limits on length."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hfgpt"
FILES = sorted(PACKAGE.rglob("*.py"))
# A file imports only from lower layers, or from files in its own folder.
LAYERS = [
    {"", "configuration_hfgpt", "errors", "demo_corpus"},  # "" is hfgpt/__init__.py
    {"modeling_hfgpt", "durations", "saving", "recipe_keys", "foreign_code"},
    {"records", "output"},
    {"data", "adapters"},
    {"tokenizer", "evaluation"},
    {"conversion", "datatrove"},
    {"models"},
    {"building", "known_answers"},
    {"training", "hub"},
    {"recipe"},
    {"tasks"},
    {"runs", "serving"},
    {"bench"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
TRAVELLING = ("configuration_hfgpt", "modeling_hfgpt")


def module_of(path: Path) -> str:
    """`hfgpt.data.blocks` of hfgpt/data/blocks.py."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from hfgpt import x` is hfgpt.x if that is a module."""
    modules = {module_of(file) for file in FILES}
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*folder, *filter(None, [node.module])])
            inner = {f"{base}.{alias.name}" for alias in node.names} & modules
            found |= inner or {base}
    return found


def package_of(module: str) -> str:
    """`data` of hfgpt.data.blocks, and "" of hfgpt itself."""
    return module.partition(".")[2].partition(".")[0]


def layer_of(module: str) -> int:
    layers = [number for number, rooms in enumerate(LAYERS) if package_of(module) in rooms]
    assert layers, f"{module} is in no layer: add it to LAYERS"
    return layers[0]


def functions_of(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_source_files_and_their_imports_are_found():
    assert len(FILES) >= 30
    assert sum(len(imports_of(path)) for path in FILES) > 200
    assert sum(len(functions_of(path)) for path in FILES) > 200
    # Each way to write an import is understood.
    assert "hfgpt.configuration_hfgpt" in imports_of(PACKAGE / "modeling_hfgpt.py"), "from .configuration_hfgpt import"
    assert "hfgpt.commands.train" in imports_of(PACKAGE / "cli.py"), "inside a function"
    assert {"hfgpt", "torch"} <= imports_of(PACKAGE / "commands" / "doctor.py"), "import hfgpt"
    assert "hfgpt.conversion.gpt2" in imports_of(PACKAGE / "commands" / "convert.py"), (
        "from hfgpt.conversion import gpt2"
    )
    assert "hfgpt.data.files" in imports_of(PACKAGE / "data" / "sources.py"), "from hfgpt.data.files import"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_lower_layers(path):
    module = module_of(path)
    for imported in sorted(imports_of(path)):
        if imported.partition(".")[0] != "hfgpt" or module == "hfgpt":
            continue
        siblings = package_of(imported) == package_of(module) and (PACKAGE / package_of(module)).is_dir()
        allowed = siblings or layer_of(imported) < layer_of(module)
        assert allowed, f"{module} (layer {layer_of(module)}) imports {imported} (layer {layer_of(imported)})"


def test_there_are_no_import_cycles():
    modules = {module_of(path): path for path in FILES}
    graph = {module: (imports_of(path) & modules.keys()) - {module} for module, path in modules.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises a CycleError that lists the files
    assert order.index("hfgpt.errors") < order.index("hfgpt.saving") < order.index("hfgpt.cli")


def test_the_package_itself_imports_none_of_its_modules():
    assert not {name for name in imports_of(PACKAGE / "__init__.py") if name.partition(".")[0] == "hfgpt"}


def test_data_imports_no_model():
    files = sorted((PACKAGE / "data").glob("*.py"))
    assert len(files) >= 6
    for path in files:
        rooms = {package_of(name) for name in imports_of(path) if name.partition(".")[0] == "hfgpt"}
        allowed = {"data", "demo_corpus", "errors", "records", "saving"}
        assert rooms <= allowed, f"{path.name} imports {rooms}"


@pytest.mark.parametrize("name", TRAVELLING)
def test_a_file_uploaded_to_the_hub_imports_nothing_from_hfgpt(name):
    imported = imports_of(PACKAGE / f"{name}.py")
    assert "transformers" in {module.partition(".")[0] for module in imported}
    for module in imported - {f"hfgpt.{other}" for other in TRAVELLING}:
        root = module.partition(".")[0]
        assert root in {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names, module
    # On the Hub there is no package `hfgpt`, so these files can only use relative imports.
    assert "from hfgpt" not in (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


def test_only_adapters_import_peft():
    # The script that simulates a machine without hfgpt is not counted.
    files = [path for path in FILES if path.name != "fresh_process.py"]
    importing = [path.name for path in files if any(name.startswith("peft") for name in imports_of(path))]
    assert importing == ["adapters.py"]


def test_names_are_descriptive():
    for path in FILES:
        assert not {"utils", "helpers", "util", "helper", "common", "misc"} & set(path.stem.split("_")), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path):
    for function in functions_of(path):
        where = f"{path.name}, line {function.lineno}: {function.name}"
        length = function.end_lineno - function.lineno + 1
        assert length <= 60, f"{where} has {length} lines, the limit is 60: split it"
        if any(
            isinstance(mark, ast.Call) and ast.unparse(mark.func) == "app.command" for mark in function.decorator_list
        ):
            continue  # its parameters are the command's arguments and options
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        # transformers decides what a model's forward takes.
        most = 8 if path.name == "modeling_hfgpt.py" and function.name == "forward" else 7
        assert count <= most, f"{where} has {count} parameters, the limit is {most}: group them"
