"""The translated notebooks: cell by cell the code, the formulas and the links of the English ones."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
ORIGINALS = {path.stem.split("_")[0]: path for path in FOLDER.glob("0*.ipynb")}
TRANSLATIONS = sorted(FOLDER.glob("[!.]*/*.ipynb"))
FENCED = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
each = pytest.mark.parametrize("path", TRANSLATIONS, ids=lambda path: path.stem)


def both(path):
    """The cells of a translation, each with that of the original."""
    pairs = [nbformat.read(file, 4).cells for file in (ORIGINALS[path.stem.split("_")[0]], path)]
    assert len(pairs[0]) == len(pairs[1])
    return list(zip(*pairs))


def wordless(source):
    """Code without its comments and with empty strings for all texts, as a dump of its syntax tree."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    formats = [node.format_spec for node in nodes if isinstance(node, ast.FormattedValue) and node.format_spec]
    kept = {id(part) for spec in formats for part in ast.walk(spec)}  # ".1f" is code
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in kept:
            node.value = ""
    for node in reversed(nodes):  # inner ones first
        if isinstance(node, ast.JoinedStr) and id(node) not in kept:  # another language has another order of words
            node.values = sorted((part for part in node.values if not isinstance(part, ast.Constant)), key=ast.dump)
    return ast.dump(tree)


def links(path, source):
    """What a cell links: files, each with the anchor after its #, and addresses."""
    found = re.findall(r"\]\(([^)\s]+)\)", source)
    return {link if "://" in link else str((path.parent / link).resolve()) for link in found}


def test_there_are_translations_to_compare():
    assert FOLDER / "fil" / "00_magsimula_rito.ipynb" in TRANSLATIONS


@each
def test_cells_are_those_of_the_original(path):
    for english, other in both(path):
        assert (english.id, english.cell_type, english.metadata) == (other.id, other.cell_type, other.metadata)


@each
def test_code_is_that_of_the_original_apart_from_its_texts(path):
    code = [(one, other) for one, other in both(path) if one.cell_type == "code" and one.id != "install"]
    assert code  # docs/launch.py writes the install cell
    for english, other in code:
        assert wordless(english.source) == wordless(other.source), other.id


def test_a_changed_number_or_name_is_noticed_and_changed_words_are_not():
    one = wordless('say(f"{a:.1f} of {b}", 2)  # so many')
    assert one == wordless("say(f'sa {b}: {a:.1f}', 2)")
    assert one not in map(wordless, ('say(f"{a:.2f} of {b}", 2)', 'say(f"{a:.1f} of {b}", 3)', 'say("of", 2)'))


@each
def test_formulas_fenced_lines_and_folded_parts_are_those_of_the_original(path):
    for english, other in both(path):
        if english.cell_type == "markdown":
            for pattern in (r"\$\$?[^$]+\$\$?", r"^#+ ", r"<details>", r"^\*\*\d\.\*\*", r"^\|"):
                one, two = (sorted(re.findall(pattern, cell.source, flags=re.M)) for cell in (english, other))
                assert one == two, (other.id, pattern)
            assert FENCED.findall(english.source) == FENCED.findall(other.source)


@each
def test_links_are_those_of_the_original_and_lead_somewhere(path):
    original = ORIGINALS[path.stem.split("_")[0]]
    for number, (english, other) in enumerate(both(path)):
        one, two = links(original, english.source), links(path, other.source)
        assert all("://" in link or Path(link.partition("#")[0]).is_file() for link in two)
        if number == 0:  # each names the other, and the translation says where to send corrections
            assert one - two == {str(path)} and two - one == {str(original), str(FOLDER.parent / "CONTRIBUTING.md")}
        else:
            assert one == two, other.id


@each
def test_a_translation_says_below_its_title_that_a_machine_wrote_it(path):
    note = nbformat.read(path, 4).cells[0].source.split("\n\n")[1]
    assert "written by a machine" in note and "CONTRIBUTING.md" in note
