"""Sphinx: the pages are Markdown, and the reference comes from the docstrings of the installed package."""

import sparse24

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
