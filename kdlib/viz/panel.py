"""Controls with a view: the base of all widgets."""

import warnings
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import ipywidgets as W
from IPython.display import HTML, display
from matplotlib.figure import Figure

from kdlib.errors import UserError
from kdlib.viz import display as notebook
from kdlib.viz.html import escape, page, paragraph

VIEW = "application/vnd.jupyter.widget-view+json"
Build = Callable[..., W.ValueWidget]


@dataclass
class View:
    """What a panel shows: a picture, HTML below it, or one of them."""

    html: str = ""
    figure: Figure | None = None

    @cached_property
    def png(self) -> bytes:
        """The picture as PNG bytes."""
        return quietly(notebook.picture, self.figure).data if self.figure else b""


def quietly(draw: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Draw without warnings about missing fonts: all text is in the HTML too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        return draw(*arguments, **named)


class Panel:
    """Controls with a view.

    Args:
        view: called with the value of each control by name.
        controls: by name, a partial of a widget class with its first `value`. Widgets are built when they are first
            shown, so a headless run builds none.
        adapt: called with the name of a changed control and all controls before the view is drawn; it may change
            others.
    """

    def __init__(
        self,
        view: Callable[..., View],
        adapt: Callable[[str, dict[str, W.ValueWidget]], None] | None = None,
        **controls: Build,
    ):
        self._view, self._adapt, self._builders = view, adapt, controls
        self._firsts = {name: build.keywords["value"] for name, build in controls.items()}
        self._adapting = False

    @cached_property
    def first(self) -> View:
        """The view of the first values."""
        return quietly(self._view, **self._firsts)

    @cached_property
    def controls(self) -> dict[str, W.ValueWidget]:
        """The controls by name, built when they are first needed."""
        built = {name: build(description=label_of(name, build)) for name, build in self._builders.items()}
        for name, control in built.items():
            control.style.description_width = "initial"
            control.observe(partial(self._moved, name), "value")
        return built

    @cached_property
    def image(self) -> W.Image:
        """The widget that shows the picture."""
        return W.Image(format="png", layout={"width": f"{notebook.WIDTH}px", "max_width": "100%"})

    @cached_property
    def text(self) -> W.HTML:
        """The widget that shows the HTML."""
        return W.HTML(layout={"width": "98%"})

    @cached_property
    def widget(self) -> W.VBox:
        """The panel as a widget that other widgets can hold."""
        controls = W.Box(list(self.controls.values()), layout={"flex_flow": "row wrap", "width": "98%"})
        self.put(self.first)
        return W.VBox([controls, self.image, self.text])

    @property
    def state(self) -> dict[str, Any]:
        """The values of the controls; their first values while none are built."""
        built = vars(self).get("controls", {})
        return self._firsts | {name: control.value for name, control in built.items()}

    def _moved(self, name: str, change: Mapping[str, Any]) -> None:
        if self._adapting:
            return
        try:
            if self._adapt:
                self._adapting = True
                self._adapt(name, self.controls)
            view = quietly(self._view, **self.state)
        except UserError as error:
            view = View(page(paragraph(escape(error))))
        except Exception as error:  # a callback's traceback would go to a log
            view = View(page(paragraph(f"<b>{type(error).__name__}</b>: {escape(error)}")))
        finally:
            self._adapting = False
        self.put(view)

    def put(self, view: View) -> None:
        """Show a view in the widget."""
        self.image.value = view.png
        self.image.layout.display = None if view.figure else "none"
        self.text.value = view.html

    def _ipython_display_(self) -> None:
        if notebook.headless():
            layouts = {name: build.keywords.get("layout", {}) for name, build in self._builders.items()}
            shown = [name for name, layout in layouts.items() if layout.get("display") != "none"]
            show_still(self.first, [label_of(name, self._builders[name]) for name in shown])
        else:
            display(bundle(self.widget, self.first), raw=True)


def show_still(view: View, controls: Sequence[str] = ()) -> None:
    """Show a view as ordinary output, and name the controls of a running notebook."""
    if view.figure is not None:
        display(notebook.Image(view.png, width=notebook.WIDTH))
    names = escape(", ".join(controls))
    hint = f"<p><i>A still view. In a running notebook you can change: {names}.</i></p>" if controls else ""
    if view.html or hint:
        display(HTML(view.html + hint))


def bundle(widget: W.Widget, view: View) -> dict[str, Any]:
    """One output in two forms: the widget in a running notebook, else the still view."""
    still = {"image/png": b64encode(view.png).decode()} if view.figure is not None else {"text/html": view.html}
    return {**(widget._repr_mimebundle_() or {}), **still}


def label_of(name: str, build: partial) -> str:
    """The label of a control."""
    return build.keywords.get("description", name)
