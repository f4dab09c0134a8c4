"""Settings of Sphinx for `make docs`: the pages of this folder, and the API from the docstrings of kdlib."""

from importlib import metadata

project = "kdlib"
author = "kdlib contributors"
release = metadata.version("kdlib")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "kdlib"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3  # so that pages can link to each other's headings
nb_execution_mode = "off"  # notebooks are shown as a run left them

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
