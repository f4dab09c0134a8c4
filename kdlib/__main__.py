"""`python -m kdlib` is the `kdlib` command."""

from kdlib.cli import app

app(prog_name="kdlib")
