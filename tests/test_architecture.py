"""Who may import whom, and how long things may be: `palign/` read with `ast`, each breach with its file and rule."""

import ast
import functools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "palign").rglob("*.py"))

# Each part may import itself and those on lower levels; parts of one level do not know each other.
LEVELS = (
    {"types"},
    {"losses"},
    {"sharding"},
    {"attention", "heads"},
    {"models"},
    {"objectives", "generate", "eval"},
    {"train"},
    {"recipes"},
    {"cli"},
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
BESIDE = {"data", "config", "report", "plan"}  # outside the order, with rules of their own

# Outside package -> the files or folders that may import it.
ONLY_IN = {
    "flax": ("models/",),
    "orbax": ("train/checkpoint.py", "models/hf.py"),
    "ml_collections": ("config/load.py", "cli/"),
}
LOSSES_IMPORT = {"jax", "numpy", "chex", "jaxtyping"}


def name_of(file):
    return str(file.relative_to(ROOT / "palign"))


def module_of(file):
    """`palign.attention.xla` of palign/attention/xla.py, `palign.losses` of its __init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(tree, module, is_package):
    """Every module that is imported anywhere, also inside functions: `from a import b` gives `a.b`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def part_of(module):
    """`attention` of `palign.attention.xla`, None of what is not palign's."""
    names = module.split(".")
    return names[1] if names[0] == "palign" and len(names) > 1 else None


def breaches(name, module, tree):
    """The rules that one file breaks, as sentences."""
    own, found = part_of(module), []
    for imported in imports_of(tree, module, name.endswith("__init__.py")):
        other, package = part_of(imported), imported.split(".")[0]
        if other is not None and other != own and (rule := _inside(own, other, imported)):
            found.append(f"{name} imports {imported}: {rule}")
        elif other is None and (rule := _outside(name, own, package)):
            found.append(f"{name} imports {imported}: {rule}")
    return found


def _inside(own, other, imported):
    if other == "config":
        if imported.startswith("palign.config.load") and own not in ("train", "recipes", "cli"):
            return "config.load is for train, recipes and cli only"
        return None if imported.startswith(("palign.config.load", "palign.config.schema")) else "no such module"
    if own == "config":
        return "config imports nothing of palign"
    if own == "data":
        allowed = other == "types" or imported.startswith("palign.attention.block_pairs")
        return None if allowed else "data imports types and attention.block_pairs only"
    if own in ("report", "plan"):
        below = other in LEVEL and LEVEL[other] < LEVEL["recipes"]
        allowed = below or (own == "plan" and other == "data")  # a plan assumes a row
        return None if allowed else f"{own} imports what is below recipes"
    if other in ("report", "plan"):
        return None if own in ("recipes", "cli") else f"{other} is for recipes and cli only"
    if other == "data":
        return None if LEVEL.get(own, -1) >= LEVEL["objectives"] else "data is for eval, generate, train and above"
    if own not in LEVEL or other not in LEVEL:
        return f"{own if own not in LEVEL else other} is not a part that DESIGN names"
    return None if LEVEL[other] < LEVEL[own] else f"{own} may import only what is below it, {other} is not"


def _outside(name, own, package):
    if own == "losses" and package not in LOSSES_IMPORT | set(sys.stdlib_module_names):
        return f"losses import {', '.join(sorted(LOSSES_IMPORT))} only"
    if own == "data" and package in ("jax", "jaxlib", "flax", "optax"):
        return "data has no jax of its own"
    if name in ("config/schema.py", "config/renamed.py") and package not in sys.stdlib_module_names:
        return "config.schema and config.renamed are standard library only"
    if name == "types.py" and package not in sys.stdlib_module_names:
        return "types imports the standard library only"
    places = ONLY_IN.get(package)
    if places and not any(name == place or (place.endswith("/") and name.startswith(place)) for place in places):
        return f"{package} only in {', '.join(places)}"
    return None


def body_lines(node, source):
    """Lines of a file or function, its own and inner docstrings apart."""
    first, last = (1, len(source)) if isinstance(node, ast.Module) else (node.lineno, node.end_lineno)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = 0
    for inner in ast.walk(node):
        if isinstance(inner, documented) and ast.get_docstring(inner, clean=False) is not None:
            docstrings += inner.body[0].end_lineno - inner.body[0].lineno + 1
    return last - first + 1 - docstrings


def too_long(name, tree, source):
    """Files of 400 lines, functions of 40, and command-line files of more than 60."""
    found, lines = [], body_lines(tree, source)
    limit = 61 if name.startswith("cli/") else 400
    if lines >= limit:
        found.append(f"{name}: {lines} lines apart from docstrings, expected fewer than {limit}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := body_lines(node, source)) >= 40:
            where = f"{name}:{node.lineno}: function {node.name}"
            found.append(f"{where} has {lines} lines apart from docstrings, expected fewer than 40")
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_one_way(file):
    found = breaches(name_of(file), module_of(file), tree_of(file))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_stay_short(file):
    found = too_long(name_of(file), tree_of(file), file.read_text(encoding="utf-8").splitlines())
    assert not found, "\n".join(found)


def test_packages_have_empty_init_files_except_the_losses():
    public = ("losses/__init__.py", "losses/experimental/__init__.py")
    for file in FILES:
        if file.name == "__init__.py" and name_of(file) not in public:
            assert not file.read_text(encoding="utf-8").strip(), f"{name_of(file)}: expected an empty file"


def test_there_is_no_drawer_for_everything():
    names = {file.stem for file in FILES}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_every_part_has_its_rule():
    parts = {part_of(module_of(file)) for file in FILES} - {None}
    assert parts <= set(LEVEL) | BESIDE, f"{parts - set(LEVEL) - BESIDE}: no rule says who may import it"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("types.py", "import jax"),
        ("losses/new.py", "import optax"),
        ("losses/new.py", "from palign.types import Batch, Mean\nfrom palign.heads import targets"),
        ("losses/pairwise/new.py", "from ...sharding import mesh"),
        ("sharding/mesh.py", "from palign import heads"),
        ("attention/xla.py", "from palign.heads.targets import Tower"),
        ("heads/new.py", "def f():\n    import palign.models.config"),
        ("heads/new.py", "import flax.linen as nn"),
        ("models/new.py", "from palign.data.pack import pack_row"),
        ("models/new.py", "from palign.config.load import to_plain"),
        ("models/new.py", "import orbax.checkpoint"),
        ("objectives/new.py", "from palign.generate import sample"),
        ("generate/new.py", "from palign.train.state import TrainState"),
        ("train/loop.py", "from palign.report.page import write"),
        ("train/loop.py", "import orbax.checkpoint"),
        ("train/loop.py", "import ml_collections"),
        ("train/loop.py", "from palign.recipes import quickstart"),
        ("recipes/new.py", "from palign.cli import train"),
        ("data/pack.py", "import jax.numpy as jnp"),
        ("data/pack.py", "from palign.attention.xla import attend"),
        ("data/pack.py", "from palign.losses import dpo"),
        ("config/schema.py", "import numpy as np"),
        ("config/renamed.py", "import numpy as np"),
        ("config/load.py", "from palign.train import step"),
        ("report/new.py", "from palign.recipes import quickstart"),
        ("tools/new.py", "from palign.train import step"),
    ],
)
def test_the_rules_catch_what_breaks_them(name, line):
    found = breaches(name, "palign." + name.removesuffix(".py").replace("/", "."), ast.parse(line))
    assert len(found) == 1 and found[0].startswith(f"{name} imports ")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("eval/new.py", "from palign.heads.target_values import target_logps\nfrom palign.data.pack import pack_row"),
        ("data/plan.py", "from palign.attention.block_pairs import list_block_pairs\nfrom palign.types import Batch"),
        ("models/hf.py", "import orbax.checkpoint\nfrom palign.config.schema import ModelConfig"),
        ("train/loop.py", "from palign.config.load import to_plain\nfrom . import step"),
        ("cli/plan.py", "import ml_collections\nfrom palign.plan import memory\nfrom palign.report import page"),
        ("losses/new.py", "from palign.losses.checks import as_float\nimport chex, math"),
        ("plan/new.py", "from palign.train.step import make_train_step\nfrom palign.data.pack import pack_row"),
    ],
)
def test_the_rules_let_through_what_keeps_them(name, line):
    assert not breaches(name, "palign." + name.removesuffix(".py").replace("/", "."), ast.parse(line))


def test_the_ruler_sees_long_files_and_functions_and_forgives_docstrings():
    long = "def f():\n" + "    x = 1\n" * 39
    assert too_long("train/x.py", ast.parse(long), long.splitlines())
    documented = 'def f():\n    """Says.\n\n' + "    More.\n" * 50 + '    """\n' + "    x = 1\n" * 30
    assert not too_long("train/x.py", ast.parse(documented), documented.splitlines())
    lines = "x = 1\n" * 61
    assert too_long("cli/x.py", ast.parse(lines), lines.splitlines())
    assert not too_long("train/x.py", ast.parse(lines), lines.splitlines())
