"""Who may import whom. Inside a package a module imports only lower floors, so there are no cycles."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"cfstore": ROOT / "cfstore", "cftrain": ROOT / "cftrain", "cfkernels": ROOT / "kernels" / "cfkernels"}

# Bottom first. A name stands for the module or the whole package of that name.
FLOORS = {
    "cfstore": [
        {"errors", "types", "render", "remote"},
        {"names", "schema", "digests", "halves", "ring", "codecs", "processes", "alignment", "derivation", "clusters",
         "ray_connection", "remote.locate", "remote.retry", "remote_parquet"},
        {"convert", "neighbours", "remote.bucket"},
        {"remote.leases", "remote.uploads"},
        {"parsers.sources", "parsers.row_runs", "parsers.chunk_tree", "shards.records", "shards.files"},
        {"parsers.hdf5", "parsers.torch_file", "shards.packed", "shards.members"},
        {"labels", "locks", "splits", "clinical", "runs", "synth"},
        {"ray_engine"},
        {"engines"},
        {"parsers.layout", "shards.zarr_shard", "shards.tar_shard", "remote.creation", "remote.disk_cache"},
        {"parsers", "shards"},
        {"derived_files"},
        {"derived_tables"},
        {"catalog", "files"},
        {"mirrors", "remote.staging", "remote.orphans"},
        {"remote.commits"},
        {"writing"},
        {"attempts"},
        {"plan", "query", "info", "places", "tables"},
        {"selection", "parts"},
        {"remote_parts"},
        {"cohort", "reader", "shard_job", "derived_reader"},
        {"ingest", "derive_job"},
        {"derived_check"},
        {"removal", "verify", "export", "bench", "derive", "prototypes"},
        {"store", "describe"},
        {"opening", "tar_store"},
        {""},
        {"cli"},
    ],
    "cftrain": [
        {"errors", "memory", "stopping"},
        {"zoo", "cache", "ranks", "examples", "rank_agent", "rank_places"},
        {"config", "survival", "models", "device", "extras", "flops", "ray_ranks"},
        {"drawn"},
        {"folds", "arrivals", "checkpoints", "assessment", "report", "compare", "footprint", "estimate"},
        {"order", "run_directory", "budget", "costs"},
        {"planned"},
        {"data"},
        {"feed", "training_fold", "fitting_models"},
        {"loop", "provenance"},
        {"results"},
        {"nested"},
        {"learner", "summary"},
        {"passes"},
        {"teams"},
        {"experiment", "prediction", "tensorboard"},
        {"heatmap"},
        {"forecast", "apart"},
        {"sweep"},
        {"ray_jobs"},
        {"cli"},
        {"__main__"},
    ],
    "cfkernels": [
        {"errors"},
        {"dispatch", "packing"},
        {"dropout", "triton_support"},
        {"library", "windows"},
        {"attention", "dropout_add", "gelu_dropout", "grouped_window_conv", "layer_norm", "mix_layer_norms", "ppeg"},
        {"attention_column_sums"},
        {"explain"},
        {""},
    ],
}  # fmt: skip
ALLOWED_PACKAGES = {"cfstore": set(), "cftrain": {"cfstore", "cfkernels"}, "cfkernels": set()}


def modules(package: str) -> list[tuple[str, Path]]:
    """(dotted name below the package, file); the package's own __init__ is ''."""
    base = PACKAGES[package]
    found = []
    for path in sorted(base.rglob("*.py")):
        parts = list(path.relative_to(base).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append((".".join(parts), path))
    return found


def imports(path: Path) -> list[str]:
    """Every module that a file imports, at module scope or inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def is_module(dotted: str) -> bool:
    package, *rest = dotted.split(".")
    base = PACKAGES[package].joinpath(*rest)
    return base.is_dir() or base.with_suffix(".py").is_file()


def as_module(dotted: str) -> str:
    """`cfstore.errors.StoreError` -> `cfstore.errors`."""
    while not is_module(dotted):
        dotted = dotted.rpartition(".")[0]
    return dotted


def room(package: str, module: str) -> str:
    """The entry of FLOORS that a module belongs to: itself, or the nearest package above it."""
    rooms = set().union(*FLOORS[package])
    while module not in rooms and module:
        module = module.rpartition(".")[0]
    return module


def floor(package: str, module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS[package]) if room(package, module) in rooms)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_imports_only_lower_floors_of_its_package(package):
    for module, path in modules(package):
        for target in (as_module(name) for name in imports(path) if name.split(".")[0] == package):
            below = target.removeprefix(package).lstrip(".")
            if room(package, below) == room(package, module):
                continue  # a package may arrange its own modules; cycles among them are caught below
            assert floor(package, below) < floor(package, module), (
                f"{package}.{module} (floor {floor(package, module)}) imports {target} (floor {floor(package, below)})"
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package):
    graph = {
        module: {
            as_module(name).removeprefix(package).lstrip(".") for name in imports(path) if name.split(".")[0] == package
        }
        - {module}
        for module, path in modules(package)
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"{package}: circle {' -> '.join([*trail, module])}"
        if module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_floor(package):
    assert [module for module, _ in modules(package) if module and not room(package, module)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_uses_only_the_public_names_of_the_packages_it_may_know(package):
    for module, path in modules(package):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [node.module] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in named:
                other = name.split(".")[0]
                if other in PACKAGES and other != package:
                    assert other in ALLOWED_PACKAGES[package], f"{package}.{module} imports {name}"
                    assert name == other, f"{package}.{module} reaches into {name}; use the names of {other}"


@pytest.mark.parametrize("package", PACKAGES)
def test_only_command_lines_and_lazy_rooms_hide_imports_in_functions(package):
    """Imports inside functions keep what is large and rarely needed (torch, Ray, SciPy's trees) out of the rest."""
    allowed = {
        "cfstore": {"cli", "halves", "neighbours", "parsers.torch_file", "ray_engine", "remote.bucket"},
        "cftrain": {"cli"},
        "cfkernels": set(),
    }
    for module, path in modules(package):
        tree = ast.parse(path.read_text())
        hidden = [
            node.lineno
            for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        assert not hidden or room(package, module) in allowed[package], (
            f"{package}.{module}: import inside a function, line {hidden[0]}"
        )


@pytest.mark.parametrize("package", PACKAGES)
def test_only_command_lines_print(package):
    for module, path in modules(package):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "print" not in names, f"{package}.{module} prints"
        if room(package, module) not in ("cli", "__main__"):
            assert not any(name.split(".")[0] == "click" for name in imports(path)), f"{package}.{module} imports click"


@pytest.mark.parametrize(
    "statement",
    [
        "from cfstore.cli import main; main(['--help'])",
        "from cftrain.cli import main; main(['--help'])",
        "from cftrain.cli import main; main(['run', '--help'])",
        "from cftrain.cli import main; main(['sweep', '--help'])",
        "from cfstore.cli import main; main(['ingest', '--help'])",
        "import cfstore",
        "import cftrain",
        "from cftrain.cli import main; main(['models'])",
        "from cftrain.cli import main; main(['compare', 'no such run'])",
        "from cftrain.cli import main; main(['run', '--cohort', 'C', '--set', 'train.epoch=3'])",
    ],
)
def test_help_and_imports_load_no_torch(statement):
    code = f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "torch was imported"


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
