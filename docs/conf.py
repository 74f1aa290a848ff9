"""Sphinx: `python -m sphinx -W --keep-going docs docs/_build`, with the group `docs` installed."""

from __future__ import annotations

import elastic_timer

project = "elastic-timer"
author = "The elastic-timer authors"
copyright = author
release = version = elastic_timer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = False

# Links to headings, as they work where Markdown is shown without Sphinx.
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

# In docstrings a single backtick is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
