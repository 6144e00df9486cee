"""Sphinx: the pages are Markdown, and the reference comes from the docstrings of the installed package."""

import importlib
import inspect

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

import sparse24
from sparse24.ops import functions

project = "sparse24"
author = "the sparse24 authors"
copyright = author
version = release = sparse24.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sparse24 {version}"

default_role = "py:obj"  # names in the docstrings are links where they are documented

napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "none"  # the docstrings say more: shapes and dtypes
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 2


class Generated(Directive):
    """A part of the page that is written here."""

    def lines(self) -> list[str]:
        """Return it as reStructuredText."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Parse it."""
        parent = nodes.section()
        self.state.nested_parse(StringList(self.lines(), "docs/conf.py"), 0, parent)
        return parent.children


class Ops(Generated):
    """Entries of all ops of a family: ``.. ops:: compression``."""

    required_arguments = 1

    def lines(self) -> list[str]:
        """List them."""
        family = importlib.import_module(f"sparse24.ops.{self.arguments[0]}")
        return [f".. autofunction:: sparse24.{name}" for name in family.__all__]


class OpsTable(Generated):
    """How all ops are called, and the first sentence of what they do."""

    def lines(self) -> list[str]:
        """List them."""
        lines = [".. list-table::", "   :widths: 60 40", ""]
        for name in functions.__all__:
            function = getattr(sparse24, name)
            signature = inspect.signature(function)
            bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
            call = signature.replace(parameters=bare, return_annotation=signature.empty)
            lines += [f"   * - ``{name}{call}``", f"     - {inspect.getdoc(function).splitlines()[0]}"]
        return lines


def setup(app):
    """Register the directives: Sphinx calls this."""
    app.add_directive("ops", Ops)
    app.add_directive("ops-table", OpsTable)
