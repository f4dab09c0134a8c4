"""Show figures, sentences that quote results, and a learning curve that grows, in a notebook."""

import io
import os
from collections.abc import Callable

import pandas as pd
from IPython import get_ipython
from IPython.display import DisplayHandle, Image, Markdown, display
from matplotlib.figure import Figure

from kdlib.viz import figures

WIDTH = 820  # pixels on the page; the image has twice as many


def headless() -> bool:
    """Whether nobody can answer: there is no kernel, or papermill, nbconvert or another nbclient runs the cell.

    Front ends with a person allow a cell to ask for input; nbclient does not. Voila uses nbclient for a person.
    """
    if os.environ.get("SERVER_SOFTWARE", "").startswith("voila"):
        return False
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is None or not kernel.get_parent("shell").get("content", {}).get("allow_stdin", False)


def picture(figure: Figure) -> Image:
    """A figure as a PNG that shows in any notebook viewer, trusted or not."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160, metadata={"Software": None})
    return Image(data.getvalue(), width=WIDTH)


def show(figure: Figure) -> None:
    """Show a figure in the notebook."""
    display(picture(figure))


def say(text: str) -> None:
    """Show a sentence that quotes this run's results. Numbers in prose come from the table."""
    display(Markdown(text))


def live_curve(draw: Callable[[pd.DataFrame], Figure] = figures.live_curve) -> Callable[[pd.DataFrame], None]:
    """A learning curve that is redrawn in place. Pass it as `on_point`."""
    handle: list[DisplayHandle] = []

    def redraw(curve: pd.DataFrame) -> None:
        image = picture(draw(curve))
        if handle:
            handle[0].update(image)
        else:
            handle.append(display(image, display_id=True))

    return redraw
