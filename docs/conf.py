"""The site: ``python -m sphinx -W docs out/site``. With DOCS_INTERSPHINX set it reads other sites' indices."""

import os

import grouped_newton

project = "grouped_newton"
author = copyright = "The grouped_newton authors"
version = release = grouped_newton.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "grouped_newton"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run pages and notebooks; what is stored is shown

autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings say it, with shapes
napoleon_use_ivar = True
add_module_names = False

if os.environ.get("DOCS_INTERSPHINX"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }


def as_a_user_writes_it(app, what, name, obj, options, signature, returns):
    """Defaults without the modules' private names for each other."""
    return signature and signature.replace("_groups.", "groups.").replace("_rates.", ""), returns


def setup(app):
    app.connect("autodoc-process-signature", as_a_user_writes_it)
