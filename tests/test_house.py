"""The rules of the house: who may import whom, how large a room may be, what importing costs."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
FILES = sorted((SRC / "peft").rglob("*.py"))

# Ground floor first. A file imports from its own floor or from lower ones. An entry covers all that is under
# it, unless a more exact entry does.
FLOORS = (
    "errors types lazy later version fields",
    "core.defaults core.files core.hub core.header core.payload core.commit",
    "registry config known import_utils target_config",
    "kernels",
    "core",
    "storages",
    "prompts",
    "methods",
    "names status card persist loading algebra hotswap stream convert inspection",
    "model",
    "heads create mixed_model auto",
    "inspection.estimate mapping mapping_func functional helpers peft_model utils tuners optimizers",
    "__init__",
    "cli __main__",
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms.split()}

LINES, LARGER = 400, {"core/defaults.py": 600, "methods/lora/config.py": 600}
METHOD_LINES = 160  # methods/NAME.py; a method that needs more becomes a package
FUNCTION_LINES = 40  # without the docstring
REPEATED_LINES = 6

LAYERS = {"Linear", "Embedding", "MultiheadAttention", "Conv1d", "Conv2d", "Conv3d", "Conv1D", "_ConvNd"}
MAY_NAME_LAYERS = ("core/views/", "core/storage.py")
METHODS = re.compile(r"lora|dora|pissa|olora", re.IGNORECASE)
MAY_NAME_METHODS = {"core/defaults.py"}  # data, under the names that users know
PUBLIC = {"supports_lora_conversion"}

# What makes a tensor of none, and whether its dtype is torch's default unless it is given one.
OF_NO_TENSOR = {
    **dict.fromkeys(["zeros", "ones", "empty", "rand", "randn", "eye", "linspace", "logspace"], True),
    **dict.fromkeys(["tensor", "full", "arange", "as_tensor", "randint", "randperm", "triu_indices"], False),
}

IMPORT_SECONDS = 0.15
IMPORT_MODULES = {"import peft": 15, "from peft import LoraConfig, get_peft_model": 25}
OPTIONAL = ["transformers", "accelerate", "huggingface_hub", "bitsandbytes", "typer", "rich", "tqdm"]

path_of = functools.partial(lambda file: file.relative_to(SRC / "peft").as_posix())
each_file = pytest.mark.parametrize("file", FILES, ids=path_of)


@functools.cache
def tree(file: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def module_of(file: Path) -> str:
    """peft.core.layer for src/peft/core/layer.py."""
    return ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def room_of(module: str) -> str:
    """The most exact entry of FLOORS that a module belongs to; its own first name where there is none."""
    parts = module.split(".")[1:] or ["__init__"]
    exact = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((room for room in exact if room in FLOOR), parts[0])


def is_for_types_only(node: ast.AST) -> bool:
    """True for `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, without those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if not is_for_types_only(child):
            yield child
            yield from run_time_nodes(child)


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module of this package) of every import, those inside functions included."""
    name = module_of(file)
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in run_time_nodes(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "peft")
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            if source.split(".")[0] == "peft":
                whole = [f"{source}.{a.name}" for a in node.names]
                yield from ((node.lineno, m if m in MODULES else source) for m in whole)


@each_file
def test_imports_point_downward(file: Path) -> None:
    room = room_of(module_of(file))
    assert room in FLOOR, f"'{room}' has no floor yet: give it one in FLOORS"
    upward = [
        f"line {line}: {module}" for line, module in imported(file) if FLOOR.get(room_of(module), -1) > FLOOR[room]
    ]
    assert not upward


def test_no_imports_go_round_in_a_circle() -> None:
    graph = {name: {m for _, m in imported(file) if m != name} for name, file in MODULES.items()}
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    entered = {m for targets in graph.values() for m in targets}
    assert not {name: sorted(graph[name] & graph.keys()) for name in sorted(graph) if name in entered}


@each_file
def test_torch_is_imported_before_its_parts(file: Path) -> None:
    """Else threads that ask for names of this library at once, as the first to need torch, get half of torch."""
    asked = [
        name
        for node in tree(file).body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
    ]
    parts = [name for name in asked if name.partition(".")[0] == "torch"]
    assert not parts or parts[0] == "torch"


@each_file
def test_a_file_is_short_enough_to_read_at_once(file: Path) -> None:
    path, length = path_of(file), len(file.read_text(encoding="utf-8").splitlines())
    is_method = re.fullmatch(r"methods/(?!__)\w+\.py", path)
    assert length <= (METHOD_LINES if is_method else LARGER.get(path, LINES))


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert function.end_lineno is not None
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    doc = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - doc


@each_file
def test_a_function_does_one_thing(file: Path) -> None:
    functions = (n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    assert not {f"{f.name}, line {f.lineno}": length_of(f) for f in functions if length_of(f) > FUNCTION_LINES}


@each_file
def test_layer_types_are_told_apart_only_where_views_are(file: Path) -> None:
    if path_of(file).startswith(MAY_NAME_LAYERS):
        return
    tests = (
        n
        for n in ast.walk(tree(file))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in ("isinstance", "issubclass")
    )
    named = {
        f"line {test.lineno}: {name}"
        for test in tests
        for node in ast.walk(test.args[1])
        if (name := getattr(node, "attr", getattr(node, "id", ""))) in LAYERS
    }
    assert not named


CORE = [f for f in FILES if path_of(f).startswith(("core/", "kernels/")) and path_of(f) not in MAY_NAME_METHODS]


@pytest.mark.parametrize("file", CORE, ids=path_of)
def test_the_core_names_no_method(file: Path) -> None:
    names = (
        (node.lineno, name)
        for node in ast.walk(tree(file))
        for name in (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None))
        if isinstance(name, str) and hasattr(node, "lineno")
    )
    assert not sorted({f"line {line}: {name}" for line, name in names if METHODS.search(name) and name not in PUBLIC})


def is_listing(node: ast.AST) -> bool:
    """True for imports and for `__all__`, which name things without saying anything about them."""
    assigned = node.targets[0] if isinstance(node, ast.Assign) else None
    return isinstance(node, ast.Import | ast.ImportFrom) or getattr(assigned, "id", "") == "__all__"


@functools.cache
def lines_of(file: Path) -> list[tuple[int, str]]:
    """(line number, text) of the lines that say something: no blanks, comments, listings, punctuation."""
    skipped = {
        line for node in ast.walk(tree(file)) if is_listing(node) for line in range(node.lineno, node.end_lineno + 1)
    }
    numbered = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    texts = ((number, " ".join(text.split())) for number, text in numbered if number not in skipped)
    return [(number, text) for number, text in texts if re.search(r"\w", text) and not text.startswith("#")]


def creations(file: Path) -> Iterator[tuple[int, str, set[str | None]]]:
    """(line, function, keywords) of every tensor that torch is asked to make."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(f := node.func, ast.Attribute) and ast.unparse(f.value) == "torch":
            yield node.lineno, f.attr, {k.arg for k in node.keywords}


@pytest.mark.parametrize("file", [f for f in FILES if "cli" not in f.parts], ids=path_of)
def test_no_tensor_hangs_on_the_default_dtype_or_device_of_torch(file: Path) -> None:
    """None among the keywords stands for `**more`."""
    for line, name, given in creations(file):
        if name in OF_NO_TENSOR:
            where = f"{path_of(file)}:{line}: torch.{name}(...)"
            assert given & {"device", None}, f"{where} is made on the device that `torch.set_default_device` says"
            wanted = {"dtype", None} if OF_NO_TENSOR[name] else given
            assert given & wanted, f"{where} is of the dtype that `torch.set_default_dtype` says"


def test_no_six_lines_are_written_twice() -> None:
    seen: dict[tuple[str, ...], tuple[Path, int]] = {}
    repeated = []
    for file in FILES:
        lines = lines_of(file)
        for i in range(len(lines) - REPEATED_LINES + 1):
            window = lines[i : i + REPEATED_LINES]
            other, line = seen.setdefault(tuple(text for _, text in window), (file, i))
            if (other, line) != (file, i) and not (other == file and i - line < REPEATED_LINES):
                repeated.append(f"{path_of(file)}:{window[0][0]} repeats {path_of(other)}:{lines_of(other)[line][0]}")
    assert not repeated


PROBE = """
import json, sys, time, torch
before, start = set(sys.modules), time.process_time()
{statement}
spent = time.process_time() - start
print(json.dumps([spent, sorted(set(sys.modules) - before)]))
"""


def cost(statement: str) -> tuple[float, list[str]]:
    """Seconds and modules that a statement adds to a fresh process that has torch."""
    done = subprocess.run([sys.executable, "-c", PROBE.format(statement=statement)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spent, modules = json.loads(done.stdout)
    return spent, modules


@pytest.mark.parametrize("statement", IMPORT_MODULES)
def test_importing_costs_next_to_nothing_over_torch(statement: str) -> None:
    spent, modules = cost(statement)
    for _ in range(4):  # the smallest of five: other processes only ever add to it
        if spent <= IMPORT_SECONDS:
            break
        spent = min(spent, cost(statement)[0])
    assert not {m.split(".")[0] for m in modules} & set(OPTIONAL)
    assert len(modules) <= IMPORT_MODULES[statement], modules
    assert spent <= IMPORT_SECONDS


MACHINE = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/|\.\./shared")
UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b|please report", re.IGNORECASE)


def texts() -> Iterator[Path]:
    """Every text file that the project keeps, data aside."""
    yield from (ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run"))
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "src/**/*.py",
        "tests/*.py",
        "examples/*.py",
        "benchmarks/**/*.py",
    ):
        yield from ROOT.glob(pattern)


def test_nothing_is_left_unfinished_or_tied_to_one_machine() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for file in texts()
        if file != Path(__file__).resolve()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE.search(line) or UNFINISHED.search(line)
    ]
    assert not found


def test_the_map_of_the_code_names_every_room_and_none_that_is_gone() -> None:
    """ARCHITECTURE.md; methods of one file and old import paths (`tuners`, `utils`) are named as a whole there."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", text)) | {"mapping_func"}
    ways = re.compile(r"(tuners|utils|optimizers)/.+|methods/((lora|adalora)/)?\w+\.py|.*__")
    rooms = [path_of(file) for file in FILES if not ways.match(path_of(file))]
    assert not [room for room in rooms if Path(room).stem not in words]
    named = re.findall(r"`((?:\w+/)+|(?:\w+/)*\w+\.py)`", text)
    rooms_of = (
        "",
        "tests",
        "tests/clients",
        *(f"src/peft/{room}" for room in ("", "methods", "core", "kernels", "cli")),
    )
    places = [ROOT / room for room in rooms_of]
    assert not [name for name in named if not any((place / name).exists() for place in places)]


def test_the_version_is_the_same_everywhere() -> None:
    import peft

    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert declared[1] == peft.__version__


def test_importing_draws_no_random_numbers() -> None:
    everything = "; ".join(
        f"import {name}" for name in sorted(MODULES) if name.startswith(("peft.core", "peft.methods"))
    )
    state = "torch.get_rng_state()"
    probe = f"import torch; torch.manual_seed(0); a = {state}; {everything}; print(torch.equal(a, {state}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", probe], capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


BESIDE = sorted([*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


@pytest.mark.parametrize("path", BESIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_examples_and_benchmarks_import_is_there(path: Path):
    """Also where they import it inside a function, which no test of theirs may reach."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "peft":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    alias.name
                )
