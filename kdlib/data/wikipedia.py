"""A dump of a Wikipedia (`pages-articles.xml`) as text, one article at a time."""

from collections.abc import Iterator
from typing import Any, BinaryIO
from xml.etree import ElementTree

import pandas as pd

AT_ONCE = 100  # articles of a table
NOT_TEXT = ("ref", "table", "gallery", "math", "code", "syntaxhighlight", "timeline", "imagemap")  # tags
LEFT_OUT = {"6", "14"}  # namespaces whose links show no text in the line: files, categories


def articles(file: BinaryIO) -> Iterator[pd.DataFrame]:
    """The articles of a dump as tables: `text` without markup, and `document`, the title.

    Redirects, and pages that are not articles (talk, users, templates), are left out.

    Args:
        file: the XML, unpacked.

    Raises:
        ValueError: for XML that is no such dump.
    """
    events = ElementTree.iterparse(file, ("start", "end"))
    _, root = next(events)
    if _name(root) != "mediawiki":
        raise ValueError(f"its first element is <{_name(root)}>; a Wikipedia dump has <mediawiki>")
    prefixes, rows = {"file", "image", "category"}, []
    for event, element in events:
        if event == "end" and _name(element) == "namespace" and element.get("key") in LEFT_OUT:
            prefixes.add((element.text or "").lower())
        if event == "end" and _name(element) == "page":
            parts = {_name(part): part for part in element.iter()}
            if parts["ns"].text == "0" and "redirect" not in parts and (text := parts["text"].text):
                rows.append({"text": plain(text, prefixes), "document": parts["title"].text})
            root.clear()  # else every page stays in memory
        if len(rows) == AT_ONCE:
            yield pd.DataFrame(rows)
            rows = []
    yield pd.DataFrame(rows, columns=["text", "document"])


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def plain(text: str, prefixes: set[str]) -> str:
    """Wikitext as plain text, a paragraph a line.

    Args:
        text: wikitext.
        prefixes: of links to files and categories, in lower case.
    """
    import mwparserfromhell
    from mwparserfromhell.nodes import Heading, Tag, Wikilink

    code = mwparserfromhell.parse(text)

    def unwanted(node: Any) -> bool:
        if isinstance(node, Wikilink):
            return str(node.title).partition(":")[0].strip().lower() in prefixes
        return isinstance(node, Heading) or (isinstance(node, Tag) and str(node.tag).lower() in NOT_TEXT)

    for node in code.filter(recursive=False, matches=unwanted):
        code.remove(node)
    lines = (line.strip(" \t'*#:;") for line in code.strip_code().splitlines())
    return "\n".join(line for line in lines if line)
