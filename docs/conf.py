"""Settings of Sphinx for `make docs`: the pages of this folder, and the API from the docstrings of kdlib."""

import re
from importlib import metadata

from docutils import nodes
from latex2mathml.converter import convert

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

html_math_renderer = "mathml"  # browsers show it themselves; MathJax would be loaded from another host
nb_ipywidgets_js = {}  # a still view stands for each widget


def _inline(page, node):
    page.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(page, node):
    page.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def _know_anchors(app, page):
    """Links to `page.md#name` may lead to an `<a id="name">` there. MyST itself knows the headings alone."""
    known = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for node in page.findall(nodes.raw):
        for name in re.findall(r'<a id="([^"]+)"', node.astext()):
            known.setdefault(name, (node.line or 0, name, name))  # line, id, text of a link that has none


def setup(app):
    """Formulas become MathML when the pages are built, and links find anchors."""
    app.connect("doctree-read", _know_anchors)
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
