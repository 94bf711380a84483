"""The arrows of CONTRIBUTING.md: who may import whom, and that nobody writes into another file's objects."""

import ast
from pathlib import Path

import pytest

import hf_quest

PACKAGE = Path(hf_quest.__file__).parent
# What the files of each room may import of this package, besides their own room.
ARROWS = {
    "errors": set(),
    "rounding": set(),
    "reference": {"rounding"},
    "stripes": {"reference"},
    "codes": {"reference", "stripes"},
    "kernels": {"reference", "stripes"},
    "storage": {"errors", "kernels", "reference"},
    "prompts": {"kernels", "reference"},
    "methods": {"codes", "kernels", "reference", "storage", "stripes"},
    "watch": {"reference"},
    "auditing": {"errors", "watch"},
    "former": {"errors", "watch"},
    "seam": {"errors", "kernels", "methods", "prompts", "reference", "storage", "watch", "former"},
}
# What objects of Transformers and PyTorch are given, and by which file alone.
GIVEN = {
    "storage/host.py": {"atexit"},  # of finalizers, since CUDA ends before Python does
    "kernels/build.py": {"CUDA_HOME"},  # of PyTorch's compiler
    "seam/layer.py": {
        "quest_layer",
        "quest_positions",
        "quest_weights",
    },  # of the tensors that the model hands on to its attention
    "seam/region.py": {"quest_region", "region"},  # of those tensors in a compiled layer, and of the thread
    "seam/capture/recording.py": {"_compiled_call"},  # of the model, for `generate`
    "seam/compiling.py": {"_compiled_call_impl"},  # of decoder layers, as `nn.Module.compile` sets it
}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files(room):
    path = PACKAGE / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


FILES = [pytest.param(path, id=str(path.relative_to(PACKAGE))) for room in ARROWS for path in files(room)]


def imported_rooms(path):
    """The rooms of this package that a file imports, those inside of functions included."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = (*base, *(node.module or "").split("."))
            module = tuple(filter(None, module))
            if module == ("hf_quest",):
                yield from (name.name for name in node.names)
            else:
                yield module[1]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert not any(name.split(".")[0] == "hf_quest" for name in names), "imports of this package are relative"


@pytest.mark.parametrize("path", FILES)
def test_imports_follow_the_arrows(path):
    room = room_of(path)
    assert set(imported_rooms(path)) - {room} <= ARROWS[room]


def test_no_room_is_left_out():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    around = {
        "__init__",
        "app",
        "cli",
        "demo",
        "evaluation",
        "comparison",
        "models",
        "planning",
        "reading",
        "sketch",
        "tiny",
    }  # which may import everything
    assert rooms <= ARROWS.keys() | around


def own_names(tree):
    """Attributes that the classes of a file have: annotated fields, and what their methods assign to `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    yield item.target.id
        for target in targets(node):
            if isinstance(target.value, ast.Name) and target.value.id == "self":
                yield target.attr


def targets(node):
    """The attributes that a statement assigns."""
    found = []
    if isinstance(node, ast.Assign):
        found = node.targets
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        found = [node.target]
    for target in found:
        parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        yield from (part for part in parts if isinstance(part, ast.Attribute))


@pytest.mark.parametrize("path", FILES)
def test_nobody_writes_into_another_files_objects(path):
    tree = ast.parse(path.read_text())
    mine = set(own_names(tree)) | GIVEN.get(str(path.relative_to(PACKAGE)), set())
    for node in ast.walk(tree):
        for target in targets(node):
            is_self = isinstance(target.value, ast.Name) and target.value.id == "self"
            assert is_self or target.attr in mine, f"line {node.lineno}: {ast.unparse(target)}"


@pytest.mark.parametrize("path", FILES)
def test_files_can_be_read_in_one_go(path):
    assert path.name == "ops.py" or len(path.read_text().splitlines()) <= 300


FLOATS = {"empty", "eye", "linspace", "ones", "rand", "randn", "zeros"}
FACTORIES = FLOATS | {"arange", "full", "randint", "randperm", "tensor"}


@pytest.mark.parametrize("path", FILES)
def test_tensors_are_of_no_default_device_or_dtype(path):
    """Users change these for models of their own: `torch.set_default_device("cuda")`."""
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        function = call.func
        if not isinstance(function, ast.Attribute) or ast.unparse(function.value) != "torch":
            continue
        named = [keyword.arg for keyword in call.keywords]  # None: of a dict
        if function.attr in FACTORIES and None not in named:
            assert "device" in named, f"line {call.lineno}"
            assert "dtype" in named or function.attr not in FLOATS, f"line {call.lineno}"
