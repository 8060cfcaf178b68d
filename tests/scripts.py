"""Scripts of the benchmarks, which import each other by name; ``models`` is a module of the tests too."""

import importlib
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


def imported(*names):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        for name in names:
            patch.setitem(sys.modules, name, None)
            del sys.modules[name]
        return [importlib.import_module(name) for name in names]
