"""What is written is run: README, pages, docstrings and notebooks, all found by glob; and the site is built of them."""

import doctest
import functools
import importlib
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import matplotlib.figure
import nbclient
import nbformat
import pytest

import grouped_newton as gn

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
START = DOCS / "getting_started.md"
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "grouped_newton").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OPTIONAL = ("equinox",)  # not a dependency of the tests


def read(path):
    return path.read_text(encoding="utf-8")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def code_blocks(text, language):
    """Line number and code of every fenced block of a language, without its indentation."""
    blocks = re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        indent, code = block.groups()
        line = text.count("\n", 0, block.start()) + 1
        yield line, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)


def section(word):
    """The one section of the README whose heading contains a word."""
    sections = re.split(r"^(?=## )", read(ROOT / "README.md"), flags=re.MULTILINE)
    (found,) = [s for s in sections if word in s.splitlines()[0]]
    return found


@functools.cache
def run_page(path):
    """What a page's Python leaves, run in order; a guide may go on from Getting started."""
    text = read(path)
    namespace = dict(run_page(START)) if "The snippets go on from [Getting" in text else {"__name__": path.stem}
    blocks = list(code_blocks(text, "python"))
    assert len(blocks) == text.count("```python")
    for line, code in blocks:
        for module in OPTIONAL:
            if f"import {module}" in code:
                pytest.importorskip(module)
        before = namespace.get("tx")
        with jax.numpy_rank_promotion("allow"):  # as it is for a reader
            exec(compile("\n" * line + code, name_of(path), "exec"), namespace)
            if namespace.get("tx") is not before and "tx.update" not in code:
                trace_one_update(**namespace)
    return namespace


def trace_one_update(tx, params, loss_of, batch, **_):
    """Every optimizer that a page makes takes a step, if only in shapes."""
    value_fn = lambda p: loss_of(p, batch)
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, value=value_fn(p), value_fn=value_fn), params)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if "```python" in read(path)], ids=name_of)
def test_the_python_of_a_page_runs_in_order(path):
    run_page(path)


@pytest.mark.slow
def test_the_gallery_keeps_a_small_picture_of_each_of_its_figures():
    page, folder = DOCS / "guides" / "pictures.md", DOCS / "pictures"
    drawn = {name for name, value in run_page(page).items() if isinstance(value, matplotlib.figure.Figure)}
    shown = re.findall(r"\.\./pictures/(\w+)\.png", read(page))
    assert sorted(shown) == sorted(drawn) == sorted(path.stem for path in folder.iterdir())
    assert max(path.stat().st_size for path in folder.iterdir()) < 60_000


def test_the_readme_trains():
    """Pages assert as much themselves."""
    found = run_page(ROOT / "README.md")
    assert found["loss_of"](found["eval_params"], found["batch"]) < 1  # from about 5


def test_the_readme_is_short():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 900


@pytest.mark.parametrize("heading", ["Quick start", "Test"])
def test_a_section_of_the_readme_has_one_shell_command(heading):
    ((_, command),) = code_blocks(section(heading), "bash")
    assert "python3 -m venv" in command  # it stands alone
    assert all(line.endswith("&&") for line in command.splitlines()[:-1])  # and stops at the first failure


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_what_a_page_links_to_exists(path):
    """Files, and in pages the headings."""
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", read(path))
    assert [t for t in targets if not exists(path, t)] == []


def exists(path, target):
    file, _, anchor = target.partition("#")
    file = path.parent / file if file else path
    if not file.is_file():
        return False
    headings = re.findall(r"^#+ (.*)$", read(file), re.MULTILINE) if anchor else []
    return not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_every_page_can_be_reached_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page not in seen:
            seen.add(page)
            ahead += [page.parent / t for t in re.findall(r"\]\(([^):#]+\.md)", read(page))]
    # The site's own first page and its reference are made of directives.
    assert {name_of(p) for p in PAGES if p.resolve() not in seen} <= {"docs/index.md", "docs/api.md"}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built without a network and with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    environment = {k: v for k, v in os.environ.items() if k != "DOCS_INTERSPHINX"} | {"PYTHONPATH": str(ROOT)}
    options = "-W", "--keep-going", "-q", "-d", folder / "doctrees"
    command = [sys.executable, "-m", "sphinx", *options, DOCS, folder / "html"]
    built = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.mark.slow
def test_the_site_has_every_page_and_notebook(site):
    pages = [path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")]
    pages += [pathlib.Path("notebooks") / f"{path.stem}.html" for path in NOTEBOOKS]
    assert [page for page in pages if not (site / page).is_file()] == []
    assert (site / "index.html").is_file()


@pytest.mark.slow
def test_every_public_name_is_on_the_site(site):
    reference = (site / "api.html").read_text(encoding="utf-8")
    named = set(re.findall(r"gn\.groups\.(\w+)", "".join(map(read, PAGES))))
    assert len(named) > 6
    names = [f"grouped_newton.{name}" for name in gn.__all__ if name != "groups"]
    names += [f"grouped_newton.groups.{name}" for name in named]
    assert [name for name in names if f'id="{name}"' not in reference] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", MODULES, ids=str)
def test_docstring_examples_run(path):
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_function_has_an_example():
    functions = {getattr(gn, name) for name in gn.__all__} | {
        getattr(gn.groups, name) for name in re.findall(r"gn\.groups\.(\w+)", "".join(map(read, PAGES)))
    }
    functions = {f for f in functions if isinstance(f, types.FunctionType)}
    assert len(functions) > 10
    assert {f.__name__ for f in functions if not doctest.DocTestParser().get_examples(f.__doc__ or "")} == set()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("STEPS", "12")
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
