"""The package as a whole: its names, its version, and what importing it leaves alone."""

import ast
import importlib.metadata
import pathlib
import subprocess
import sys
import types

import pytest

import grouped_newton as gn

SOURCES = sorted(pathlib.Path(gn.__file__).parent.rglob("*.py"))


def test_all_names_exactly_what_is_public():
    public = {n for n, x in vars(gn).items() if not n.startswith("_") and not isinstance(x, types.ModuleType)}
    assert set(gn.__all__) == public | {"groups"}
    assert len(gn.__all__) == len(set(gn.__all__))
    assert all(getattr(gn, name).__doc__ for name in gn.__all__)


def test_the_version_is_that_of_the_metadata():
    assert gn.__version__ == importlib.metadata.version("grouped_newton")


def test_the_type_marker_is_part_of_the_package():
    assert (pathlib.Path(gn.__file__).parent / "py.typed").is_file()


def test_importing_changes_no_jax_setting_and_pulls_in_no_optional_dependency():
    code = """
import sys, jax, optax
before = dict(jax.config.values)
import grouped_newton
assert len(before) > 50 and dict(jax.config.values) == before
optional = {"matplotlib", "flax", "sklearn", "tqdm", "chex", "mpmath"}
print(*sorted(optional & set(sys.modules)))
"""
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    by_optax = subprocess.run(
        [sys.executable, "-c", "import sys, jax, optax; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert set(loaded) <= set(by_optax)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_private_jax_no_host_callback_and_no_printing(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                names.add(name)
            case ast.Import() | ast.ImportFrom():
                module = getattr(node, "module", None) or ""
                names.update(module.split("."), *(alias.name.split(".") for alias in node.names))
    assert not {name for name in names if name in {"_src", "print", "debug", "breakpoint"} or "callback" in name}
    assert not {"jax_enable_x64", "jax_debug_nans"} & names
