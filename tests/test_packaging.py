"""What is installed, and what importing costs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from importlib.resources import files
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lit_lora
from lit_lora.embedded import base_path
from lit_lora.families import ModelFamily
from lit_lora.objectives import Objective
from lit_lora.quantization import Quantization
from tests.unrelated_project import make_project

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = ("callbacks", "datamodules", "configs")
_OPTIONAL = {"pynvml": "nvidia-ml-py"}
"""Imported packages that need not be installed where tests run, with what installs them."""


def test_the_list_of_packages_is_complete() -> None:
    """One left out works when editable and is missing from the wheel."""
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("lit_lora", *MAPPED)
        for init in (ROOT / top).rglob("__init__.py")
        if not (top == "lit_lora" and init.relative_to(ROOT / "lit_lora").parts[0] in MAPPED)
    }
    expected = {name if name.startswith("lit_lora") else f"lit_lora.{name}" for name in found}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def requirements(*extras: str) -> list[Requirement]:
    """The direct dependencies, with those of extras and of the extras that these name."""
    project = PROJECT["project"]
    found = [Requirement(line) for line in project["dependencies"]]
    left = list(extras)
    while left:
        for one in map(Requirement, project["optional-dependencies"][left.pop()]):
            if one.name == project["name"]:
                left.extend(one.extras)
            else:
                found.append(one)
    return found


def test_constraints_name_every_dependency_in_its_range() -> None:
    """The extras are those that ``.ci/run`` installs."""
    lines = (ROOT / "constraints" / "ci.txt").read_text().splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(name): version for name, version in pinned}
    for requirement in requirements("dev", "docs"):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints/ci.txt lacks {requirement.name}"
        assert requirement.specifier.contains(version), (
            f"{requirement} excludes {version}, which constraints/ci.txt names"
        )


def test_every_package_that_is_imported_is_declared() -> None:
    """One that only another dependency asks for is gone once that one does without it."""
    code = [path for top in ("lit_lora", *MAPPED) for path in (ROOT / top).rglob("*.py")]
    nodes = [node for path in code for node in ast.walk(ast.parse(path.read_text()))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"lit_lora"}
    distributions = packages_distributions()
    of_users = set(PROJECT["project"]["optional-dependencies"]) - {"test", "docs", "dev"}
    declared = {canonicalize_name(one.name) for one in requirements(*of_users)}
    assert "psutil" in imported
    for name in sorted(imported):
        installing = distributions.get(name, [_OPTIONAL.get(name, name)])
        assert declared.intersection(map(canonicalize_name, installing)), f"pyproject.toml does not declare {name}"


def test_messages_name_extras_that_exist() -> None:
    files = [path for top in ("lit_lora", *MAPPED, "docs") for path in (ROOT / top).rglob("*") if path.is_file()]
    named = {
        extra
        for path in files
        if path.suffix in (".py", ".md", ".yaml")
        for extra in re.findall(r"lit_lora\[(\w+)\]", path.read_text())
    }
    assert {"demo", "quant", "deepspeed"} <= named <= set(PROJECT["project"]["optional-dependencies"])


def test_the_source_distribution_is_the_repository(tmp_path: Path) -> None:
    """An editable installation of it has no need of the links in ``lit_lora``."""
    tops = ["lit_lora", *MAPPED, "benchmarks", "constraints", "docs", "scripts", "tests"]
    single = ["pyproject.toml", "MANIFEST.in", "LICENSE", "mkdocs.yml", *(path.name for path in ROOT.glob("*.md"))]
    copy = tmp_path / "copy"
    for top in tops:
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / top, copy / top, symlinks=True, ignore=ignored)
    for name in single:
        shutil.copy(ROOT / name, copy)
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    [archive] = tmp_path.glob("lit_lora-*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.split("/", 1)[1] for name in (one.name for one in tar if one.isfile())}
    expected = {path.relative_to(copy).as_posix() for top in tops for path in (copy / top).rglob("*") if path.is_file()}
    generated = {"PKG-INFO", "setup.cfg"}
    assert {name for name in packed - generated if ".egg-info/" not in name} == expected | set(single)


def test_every_folder_with_code_is_a_package() -> None:
    for top in ("lit_lora", *MAPPED):
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def test_all_exported_names_exist() -> None:
    assert all(getattr(lit_lora, name) is not None for name in lit_lora.__all__)
    for package in ("callbacks", "datamodules"):
        part = import_module(f"lit_lora.{package}")
        assert part.__all__
        assert all(getattr(part, name) is getattr(lit_lora, name) for name in part.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lit_lora.Nothing


def test_every_part_is_listed() -> None:
    """Callbacks, families, objectives and quantizations that can be used are public names."""
    kinds = (Callback, ModelFamily, Objective, Quantization)
    files = [*(ROOT / "callbacks").glob("*.py"), *(ROOT / "lit_lora").glob("*/*.py")]
    for file in files:
        module = import_module(".".join(["lit_lora", *file.relative_to(ROOT).with_suffix("").parts[-2:]]))
        for name, value in vars(module).items():
            own = isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
            if own and issubclass(value, kinds) and not value.__subclasses__() and name != "EndOnError":
                assert name in lit_lora.__all__, f"{name} of {file} is missing in lit_lora/__init__.pyi"


def test_importing_is_light() -> None:
    """The package, its command line and its datamodules' package import no library of weight."""
    script = (
        "import sys, lit_lora, lit_lora.cli, lit_lora.datamodules\n"
        "lit_lora.cli.main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'lightning', 'diffusers', 'peft', 'transformers', 'jsonargparse', 'PIL'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr


def test_configs_and_base_are_package_data() -> None:
    names = {file.name for file in files("lit_lora.configs").iterdir()}
    assert {"demo.yaml", "sd15.yaml", "sd21_v.yaml", "sdxl.yaml"} <= names
    size = sum(file.stat().st_size for file in base_path().rglob("*") if file.is_file())
    assert size <= 10_000_000


@pytest.mark.slow
def test_an_unrelated_project_with_packages_of_the_same_names(tmp_path: Path) -> None:
    main = make_project(tmp_path / "project")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run([sys.executable, main], cwd=main.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "trained two steps" in result.stdout
