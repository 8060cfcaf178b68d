"""What is written is run: README, docstrings and notebooks, all found by glob."""

import doctest
import importlib
import pathlib
import re
import types

import jax
import nbclient
import nbformat
import pytest

import grouped_newton as gn

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(path.stem for path in (ROOT / "grouped_newton").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_blocks(text, language):
    """Line number and code of every fenced block of a language, without its indentation."""
    blocks = re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        indent, code = block.groups()
        line = text.count("\n", 0, block.start()) + 1
        yield line, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)


def section(word):
    """The one section of the README whose heading contains a word."""
    sections = re.split(r"^(?=## )", README, flags=re.MULTILINE)
    (found,) = [s for s in sections if word in s.splitlines()[0]]
    return found


def trace_one_update(tx, params, loss_of, batch, **_):
    """Every optimizer that the README makes takes a step, if only in shapes."""
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, value_fn=lambda q: loss_of(q, batch)), params)


def test_the_python_of_the_readme_runs_in_order():
    namespace = {"__name__": "readme"}
    blocks = list(code_blocks(README, "python"))
    assert len(blocks) == README.count("```python") > 0
    for line, code in blocks:
        before = namespace.get("tx")
        exec(compile("\n" * line + code, "README.md", "exec"), namespace)
        if namespace.get("tx") is not before:
            trace_one_update(**namespace)
    # The snippets did train: from ln 3 or more, and from a regression's variance of 5.
    assert namespace["loss"] < 0.9
    assert namespace["loss_of"](namespace["params"], namespace["batch"]) < 1


@pytest.mark.parametrize("heading", ["Quick start", "Test"])
def test_a_section_of_the_readme_has_one_shell_command(heading):
    ((_, command),) = code_blocks(section(heading), "bash")
    assert "python3 -m venv" in command  # it stands alone
    assert all(line.endswith("&&") for line in command.splitlines()[:-1])  # and stops at the first failure


def test_files_that_the_readme_links_to_exist():
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert targets
    assert [t for t in targets if not (ROOT / t).is_file()] == []


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module("grouped_newton" if name == "__init__" else f"grouped_newton.{name}")
    assert doctest.testmod(module).failed == 0


def test_every_public_function_has_an_example():
    functions = {getattr(gn, name) for name in gn.__all__} | {
        getattr(gn.groups, name) for name in re.findall(r"gn\.groups\.(\w+)", README)
    }
    functions = {f for f in functions if isinstance(f, types.FunctionType)}
    assert len(functions) > 10
    assert {f.__name__ for f in functions if not doctest.DocTestParser().get_examples(f.__doc__ or "")} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("STEPS", "20")
    notebook = nbformat.read(path, as_version=4)
    kept = [cell.copy() for cell in notebook.cells]
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": path.parent}}).execute()
    # The stored notebook has what a run leaves behind, and every picture comes out again.
    for before, after in zip(kept, notebook.cells, strict=True):
        if before.cell_type == "code":
            assert pictures(before) == pictures(after), before.source


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_outputs_and_is_valid(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(map(pictures, code)) > 0
    assert path.stat().st_size < 500_000
    assert notebook.metadata.kernelspec.name == "python3"
