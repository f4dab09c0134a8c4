"""The panel of a training: curve, speed, and a stop button."""

import signal
import threading
import time
from contextlib import suppress
from functools import cached_property
from typing import Any

import ipywidgets as W
import pandas as pd
from IPython.display import HTML, DisplayHandle, display

from kdlib.viz import display as notebook
from kdlib.viz import figures
from kdlib.viz.explore import training_facts, training_html
from kdlib.viz.html import page, paragraph
from kdlib.viz.panel import Panel, View, bundle


class TrainingPanel:
    """Loss curves, speed, time left and a stop button for a training that can stop at a checkpoint.

        with TrainingPanel(steps, tokens) as panel:
            train(on_point=panel.on_point, should_stop=panel.should_stop)

    Inside the block the kernel's interrupt works as the button; a second interrupt stops at once.

    Args:
        steps: of the whole training.
        tokens: of the whole training.
    """

    def __init__(self, steps: int, tokens: int):
        self.steps, self.tokens = steps, tokens
        self.curve = pd.DataFrame()
        self._stop = threading.Event()
        self._shown: DisplayHandle | None = None
        self._live = self._over = False
        self._drawn = self._drawing = 0.0  # when the last drawing ended, and how long it took; seconds

    def should_stop(self) -> bool:
        """Whether the training shall write a checkpoint and stop. Call it after every step."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Ask for a stop, from any thread."""
        self._stop.set()

    def on_point(self, curve: pd.DataFrame) -> None:
        """Show a curve: columns split, step, seconds, loss and the objectives.

        Drawing takes at most a twentieth of the time. Between drawings only the text changes.
        """
        self.curve = curve
        if time.monotonic() - self._drawn > 20 * self._drawing:
            self._draw()
        elif self._live:
            self.panel.text.value = self._words()

    @cached_property
    def button(self) -> W.Button:
        """The button that stops the training."""
        button = W.Button(
            description="Stop at a checkpoint", icon="stop", button_style="warning", layout={"width": "220px"}
        )

        def press(_: W.Button) -> None:
            self.stop()
            button.description, button.disabled = "Stopping …", True

        button.on_click(press)
        # While a cell runs, only messages over a subshell arrive; JupyterLab sends widgets' messages that way.
        # ipykernel 7.4 routes the answer to the running cell; we route it back to the subshell.
        button.comm._reply_subshell_for = lambda data, default: default
        return button

    @cached_property
    def panel(self) -> Panel:
        """The panel that shows the curve and the text."""
        return Panel(self._view)

    def _words(self) -> str:
        if self.curve.empty:
            text = (
                "No point of the curve: nothing was trained."
                if self._over
                else "Waiting for the first point of the curve."
            )
            return page(paragraph(text))
        facts = training_facts(self.curve, self.steps, self.tokens)
        return training_html(facts, self.curve, self._over and self.should_stop())

    def _view(self) -> View:
        points = 0 if self.curve.empty else int((self.curve["split"] == "train").sum())
        return View(self._words(), figures.live_curve(self.curve) if points > 1 else None)  # a line needs two points

    def _draw(self) -> View:
        started = time.monotonic()
        view = self._view()
        if self._live:
            self.panel.put(view)
        elif view.figure is not None:
            image = notebook.Image(view.png, width=notebook.WIDTH)
            if self._shown is None:
                self._shown = display(image, display_id=True)
            else:
                self._shown.update(image)
        self._drawn = time.monotonic()
        self._drawing = self._drawn - started
        return view

    def __enter__(self) -> "TrainingPanel":
        self._stop.clear()
        self._over = False
        self._live = not notebook.headless()
        if self._live:
            self._shown = display(bundle(self._widget, self.panel.first), raw=True, display_id=True)
        self._before = signal.getsignal(signal.SIGINT)
        with suppress(ValueError):  # outside the main thread, where no interrupt comes
            signal.signal(signal.SIGINT, self._interrupted)
        return self

    @cached_property
    def _widget(self) -> W.VBox:
        return W.VBox([self.button, self.panel.widget])

    def _interrupted(self, number: int, frame: Any) -> None:
        # Set the flag only: the interrupt may have hit a message to the widget.
        signal.signal(signal.SIGINT, self._before)
        self.stop()

    def __exit__(self, *error: Any) -> None:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, self._before)
        self._over = True
        view = self._draw()
        if self._live:
            self.button.disabled, self.button.description = True, "Stopped" if self.should_stop() else "Finished"
            self._shown.update(bundle(self._widget, view), raw=True)
        else:
            display(HTML(view.html))
