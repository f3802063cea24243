"""Which module may import which, read from the source; and what answers without torch, seen from a process."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipeline", "pretrain", "launch")
HEAVY = ("torch", "torchvision", "deepspeed", "transformers", "timm", "accelerate")
LAUNCH_MAY_IMPORT = {
    "pretrain.config",
    "pretrain.leash",
    "pretrain.preflight",
    "data_pipeline.config",
    "data_pipeline.settings",
    "data_pipeline.shards",
}
PRETRAIN_MAY_IMPORT = {
    "data_pipeline.shards",
    "data_pipeline.settings",
    "data_pipeline.decode",
    "data_pipeline.target_folder",
}
# Of pretrain, at import.
TORCH_FREE = {"main", "config", "objective_config", "command", "preflight", "signals", "leash"}


def sources(package: str) -> list[Path]:
    """Python files of a package."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, package
    return files


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports, anywhere in it or when it is imported itself."""
    return set(_imports(ast.parse(path.read_text(encoding="utf-8")), top_level_only))


def _imports(node: ast.AST, top_level_only: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            # `from package import module` imports package.module
            found = [f"{child.module}.{alias.name}" for alias in child.names if _is_module(child.module, alias.name)]
            yield from found or [child.module or ""]
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif not (top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from _imports(child, top_level_only)


def _is_module(package: str | None, name: str) -> bool:
    folder = ROOT / (package or "").replace(".", "/")
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


def outside(path: Path, allowed: set[str], own: str) -> set[str]:
    """Imports of our packages other than `own` that are not allowed."""
    ours = {name for name in imports(path) if name.split(".")[0] in PACKAGES and name.split(".")[0] != own}
    return ours - allowed


def top(names: set[str]) -> set[str]:
    """First parts of dotted names."""
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sources("data_pipeline"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_data_pipeline_imports_nothing_of_ours_and_no_torch(path: Path) -> None:
    assert not outside(path, set(), "data_pipeline")
    assert not top(imports(path)) & set(HEAVY)


@pytest.mark.parametrize("path", sources("launch"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_launch_imports_configs_and_no_torch(path: Path) -> None:
    assert not outside(path, LAUNCH_MAY_IMPORT, "launch")
    assert not top(imports(path)) & set(HEAVY)


@pytest.mark.parametrize("path", sources("pretrain"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_pretrain_knows_the_shard_contract_only(path: Path) -> None:
    assert not outside(path, PRETRAIN_MAY_IMPORT, "pretrain")


def test_one_file_knows_deepspeed() -> None:
    knowing = [path for package in PACKAGES for path in sources(package) if "deepspeed" in top(imports(path))]
    assert knowing == [ROOT / "pretrain" / "engine.py"]


def test_torch_free_files_of_pretrain_stay_so() -> None:
    for name in sorted(TORCH_FREE):
        assert not top(imports(ROOT / "pretrain" / f"{name}.py", top_level_only=True)) & set(HEAVY), name


def test_the_packages_have_empty_init_files() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").read_text() == ""


def test_an_import_inside_a_function_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("def f():\n    from pretrain import checkpoint\n    import torch.nn\n")
    assert imports(tmp_path / "x.py") == {"pretrain.checkpoint", "torch.nn"}
    assert imports(tmp_path / "x.py", top_level_only=True) == set()


# What a process really loads


def loaded_heavy(code: str, *arguments: str) -> tuple[set[str], str, int]:
    """Heavy packages in `sys.modules` after `code`, what it said on stderr, and the exit code of a SystemExit in it."""
    program = (
        "import sys\ncode = 0\ntry:\n    exec(sys.argv.pop(1))\nexcept SystemExit as end:\n    code = end.code or 0\n"
        f"print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])\nsys.exit(code)\n"
    )
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", program, code, *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60,
    )  # fmt: skip
    line = done.stdout.splitlines()[-1].split()
    assert line[0] == "LOADED", done.stdout + done.stderr
    return set(line[1:]), done.stderr, done.returncode


@pytest.mark.parametrize(
    "module", ["launch.command", "launch.local", "launch.demo", "pretrain.config", "pretrain.main"]
)
def test_import_without_torch(module: str) -> None:
    assert loaded_heavy(f"import {module}") == (set(), "", 0)


COMMAND_LINE = "from pretrain.main import main; main()"


def test_help_without_torch() -> None:
    loaded, said, code = loaded_heavy(COMMAND_LINE, "--help")
    assert (loaded, said, code) == (set(), "", 0)


@pytest.mark.parametrize("command", [["pretrain"], ["launch", "local"]])
def test_a_wrong_key_is_one_line_without_torch(command: list[str]) -> None:
    loaded, said, code = loaded_heavy(COMMAND_LINE, *command, "configs/demo/pretrain.yaml", "train.zero_stagee=1")
    assert (loaded, code) == (set(), 2)
    assert said.count("\n") == 1
    assert "train.zero_stagee: unknown key; did you mean 'zero_stage'?" in said


@pytest.mark.parametrize(
    "command", ["demo", "demo-corpus", "shard", "verify", "pretrain", "evaluate", "launch", "compare-objectives"]
)
def test_every_command_of_the_table_exists(command: str) -> None:
    loaded, said, code = loaded_heavy(COMMAND_LINE, command, "--help")
    assert (loaded, code) == (set(), 0), said
