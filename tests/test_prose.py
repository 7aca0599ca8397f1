"""The book's prose: its numbers come from results, its claims are so, its words are in the glossary."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

BOOK = Path(__file__).parents[1] / "book"
NOTEBOOKS = BOOK.parent / "notebooks"
PROSE = sorted([*BOOK.glob("*.md"), *NOTEBOOKS.glob("*.md")])
BOUND = ["intro", "results", "limits", "paper"]
"""Pages that say what the published study found."""


@pytest.fixture(scope="module")
def measured() -> ModuleType:
    """The book's extension that reads numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BOOK / "_ext")
        return importlib.import_module("measured")


def prose(path: Path) -> str:
    """What a page says in its own words: without code, equations, roles, links' targets and front matter."""
    text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(), flags=re.DOTALL)
    text = (
        re.sub(r"^(`{3,}|:::+)\{?[^\n]*\n(?:(?!\1).*\n)*?\1 *$", "", text, flags=re.MULTILINE)
        if "```" in text
        else text
    )
    for code in (r"\$\$.*?\$\$", r"\{[a-z:]+\}`[^`]*`", r"`[^`]*`", r"\$[^$]*\$", r"\]\([^)]*\)", r"<[^>]*>"):
        text = re.sub(code, " ", text, flags=re.DOTALL)
    return text


def numbers(found: object) -> Iterator[float]:
    """All numbers that a JSON document holds."""
    if isinstance(found, dict | list):
        for part in found.values() if isinstance(found, dict) else found:
            yield from numbers(part)
    elif isinstance(found, float):
        yield found


def held() -> set[str]:
    """What measurements look like when they're typed: rounded to two, three or four decimals."""
    everything = [
        x
        for path in (BOOK.parent / "benchmarks" / "results").glob("*.json")
        for x in numbers(json.loads(path.read_text()))
    ]
    return {f"{abs(x):.{places}f}" for x in everything for places in (2, 3, 4)}


DEFINED = {
    "1.82": "the voxel's size",
    "0.05": "a level of significance",
    "26.77": "the paper's",
    "92.52": "the paper's",
    "3.46": "the paper's",
    "0.89": "another study's",
    "0.80": "another study's",
    "0.82": "another study's",
    "0.15": "an example",
    "0.02": "an aim",
    "3.14": "a version of Python",
}


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_no_measured_number_is_typed(path: Path):
    typed = set(re.findall(r"(?<![\w.])\d+\.\d{2,4}(?![\w.])", prose(path))) - set(DEFINED)
    assert not typed & held(), f"bind them by {{value}}: {sorted(typed & held())}"


DIRECTIONS = re.compile(
    r"\b(below|above|lowers?|higher|raise[sd]?|exceeds?|closes|worse|better|harm|fewer|thick|thin|small|larger?|alike"
    r"|farther|nearer)\b"
)


@pytest.mark.parametrize("page", BOUND)
def test_a_number_with_a_direction_has_its_claim_checked(page: str):
    text = re.sub(r"\A.*?\n", "", (BOOK / f"{page}.md").read_text())
    for sentence in re.split(r"(?<=[.:;])\s+(?=[A-Z*])|\n\n", text):
        if "{value}" not in sentence:
            continue
        words = re.sub(r"\{claim\}`[^`]*`|\{value\}`[^`]*`", " ", sentence)
        assert not DIRECTIONS.search(words) or "{claim}" in sentence or "is better" in words, sentence


def roles() -> list[tuple[str, str]]:
    """All bound numbers and claims of the book."""
    texts = [path.read_text().replace("\\|", "|") for path in PROSE]  # as a table's cell needs it
    return [found for text in texts for found in re.findall(r"\{(value|claim)\}`([^`]*)`", text)]


def test_every_bound_number_and_claim_of_the_book_is_so(measured: ModuleType):
    assert len(roles()) > 50
    for kind, text in roles():
        assert (measured.said if kind == "value" else measured.claimed)(text.replace("\n", " "))


def test_a_claim_that_is_not_so_is_refused(measured: ModuleType):
    path = "private_recipe.private.rows[epsilon=10]"
    assert measured.claimed(f"most = {path}.loss_closed_low > 50") == "most"
    with pytest.raises(ValueError, match="isn't so"):
        measured.claimed(f"all = {path}.loss_closed_low > 99")


@pytest.mark.parametrize(("low", "high", "word"), [(-2, -1, "less"), (-2, 1, "same"), (1, 2, "more")])
def test_a_word_follows_its_interval(measured: ModuleType, monkeypatch, low, high, word):
    monkeypatch.setattr(measured, "read", lambda _: {"low": low, "high": high})
    assert measured.claimed("less | same | more = x") == word


def test_a_number_that_nobody_measured_is_missed(measured: ModuleType):
    for path in ("nothing.rows", "private_recipe.private.nothing", "private_recipe.private.rows[epsilon=7]"):
        with pytest.raises(LookupError, match=re.escape(path.partition("[")[0].split(".")[0])):
            measured.read(path)
    with pytest.raises(LookupError, match="rows are"):
        measured.read("private_recipe.private.rows[epsilon=inf]")


def test_a_chapters_tables_and_metrics_tell_the_same(measured: ModuleType):
    cell = measured.read("printed.04_evaluate[row=FD-anatomy,column=public data only]")
    row = measured.read("study.evaluate[epsilon=0].rows[metric=FD-anatomy,grouping=null]")
    assert (cell["value"], cell["low"]) == (pytest.approx(row["value"], rel=1e-3), pytest.approx(row["low"], rel=1e-3))


def test_the_reference_covers_every_public_name(measured: ModuleType):
    library = BOOK.parent / "cardiac_ldm"
    packages = re.findall(r"\{api\} (\S+)", (BOOK / "api.md").read_text())
    listed = {path for name in packages for path in (BOOK.parent / name).glob("*.py")}
    listed |= {path for name in packages if "/" in name for path in (BOOK.parent / name).rglob("*.py")}
    lacking = [path for path in library.rglob("*.py") if list(measured.public_names(path)) and path not in listed]
    assert not lacking


KNOWN = {"MRI", "UK", "LV", "RV", "YAML", "GPU"}


@pytest.mark.parametrize("path", [BOOK / f"{page}.md" for page in BOUND], ids=lambda path: path.stem)
def test_the_glossary_explains_the_abbreviations_of_the_pages_on_results(path: Path):
    terms = (BOOK / "glossary.md").read_text()
    used = set(re.findall(r"\b[A-Z]{2,}[A-Za-z0-9-]*\b", prose(path))) - KNOWN
    assert not {word for word in used if word not in terms}


RIDDLES = re.compile(
    r"learnt? by heart|\brooms?\b|hearts? (that were|was|were) asked|asked for the hearts|hearts? to turn|way itself"
    r"|how loud|\blots?\b|\bhearts of\b|what hides her|served how well|hearts look like",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_the_book_speaks_the_fields_language(path: Path):
    assert not [found[0] for found in RIDDLES.finditer(prose(path))]


def test_real_is_said_of_patients_who_exist():
    for path in sorted((BOOK / "executed").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            for output in cell.get("outputs", []):
                plot = output.get("data", {}).get("application/vnd.plotly.v1+json", {})
                texts = [trace.get("name", "") for trace in plot.get("data", [])]
                texts += [note.get("text", "") for note in plot.get("layout", {}).get("annotations", [])]
                assert not [text for text in texts if re.search(r"\breal\b", text or "")], path


def test_published_prose_is_the_notebooks():
    for path in sorted((BOOK / "executed").glob("*.ipynb")):
        source = nbformat.read(NOTEBOOKS / f"{path.stem.partition('-eps')[0]}.ipynb", 4)
        said = {cell.source for cell in source.cells if cell.cell_type == "markdown"}
        published = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
        assert not [text for text in published if text not in said], path.name
