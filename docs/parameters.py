"""The tables of a profile's parameters in docs/reference.md, written from the types in kdlib/config.py.

python docs/parameters.py            writes them between the two marks of docs/reference.md
python docs/parameters.py --check    exits with code 1 where they are not current
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdlib.config import Profile

PAGE = Path(__file__).with_name("reference.md")
MARKS = ("<!-- parameters: docs/parameters.py writes these tables -->", "<!-- end of parameters -->")
LONGEST = 60  # characters of a default that is shown whole; of longer ones only the names are
WORDS = {str: "text", bool: "true or false", int: "whole number", float: "number", Any: "any value", type(None): "null"}
LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def reference_table() -> str:
    """Every parameter of a profile in Markdown: a table a section, with key, type, default and description."""
    tables: dict[type[BaseModel], str] = {}
    parts = []
    for prefix, model in _sections(Profile):
        title = f"`{prefix.rstrip('.')}`" if prefix else "The study as a whole"
        text = f"The same keys as {tables[model]}." if model in tables else _table(prefix, model)
        tables.setdefault(model, title)
        parts.append(f"### {title}\n\n{text}\n")
    return "\n".join(parts)


def page(text: str) -> str:
    """The text of docs/reference.md, with current tables between its marks."""
    before, rest = text.split(MARKS[0], 1)
    return f"{before}{MARKS[0]}\n\n{reference_table()}\n{MARKS[1]}{rest.split(MARKS[1], 1)[1]}"


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Each section with what its keys begin with: the study itself, then what it holds."""
    yield prefix, model
    for name, field in model.model_fields.items():
        if inner := _section(field.annotation):
            many = {list: "[]", dict: ".<name>"}.get(get_origin(field.annotation), "")
            yield from _sections(inner, f"{prefix}{name}{many}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone, in a list or by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


def _table(prefix: str, model: type[BaseModel]) -> str:
    rows = [
        (f"`{prefix}{name}`", _type(field.annotation) + _limits(field), _default(field), field.description or "")
        for name, field in model.model_fields.items()
        if not isinstance(field.default, BaseModel) or type(None) in get_args(field.annotation)
    ]  # a section that cannot be null has its own table, and no row here
    lines = [("key", "type", "default", "what it is"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _type(annotation: Any) -> str:
    """A type in words, such as "list of whole numbers"."""
    kind, inner = get_origin(annotation), get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if kind is Annotated:
        return _type(inner[0]) + "".join(map(_limits, inner[1:]))
    if kind is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if kind is list:
        return f"list of {_many(_type(inner[0]))}"
    if kind is dict:
        return "mapping" if get_origin(inner[1]) is dict else f"mapping of names to {_many(_type(inner[1]))}"
    if inner:  # a union
        return " or ".join(map(_type, inner))
    return "section"


def _many(words: str) -> str:
    return re.sub(r"\b(number|section)\b", r"\1s", words)


def _limits(field: FieldInfo) -> str:
    """The smallest and largest value in parentheses, or nothing."""
    found = [
        f"{sign} {getattr(limit, key):.10g}"
        for limit in field.metadata
        for key, sign in LIMITS.items()
        if hasattr(limit, key)
    ]
    return f" ({', '.join(found)})" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.default
    if isinstance(value, BaseModel) or (isinstance(value, list) and value and isinstance(value[0], BaseModel)):
        names = [item.name for item in value if hasattr(item, "name")] if isinstance(value, list) else []
        return ", ".join(f"`{name}`" for name in names) or "(a section)"
    if isinstance(value, float):
        return f"`{value:g}`"
    shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    shown = shown.removesuffix("\n").removesuffix("\n...")
    return f"`{shown}`" if len(shown) <= LONGEST else ", ".join(f"`{name}`" for name in value)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def main() -> None:
    """Write the tables, or check them."""
    old = PAGE.read_text("utf-8")
    new = page(old)
    if "--check" in sys.argv[1:]:
        sys.exit(None if old == new else f"{PAGE}: the tables of parameters are not current; run make docs")
    if old != new:
        PAGE.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
