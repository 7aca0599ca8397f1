"""Sphinx extension: numbers and claims that are read from results, glossary links, the reference of public names.

A number in prose is bound to where it was measured, `` {value}`PATH = FORMAT` ``, and a word with a direction to its
interval, `` {claim}`below | not told from | above = PATH` `` or `` {claim}`most of = PATH > 50` ``; a claim that isn't
so fails the build.
"""

import ast
import base64
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective, SphinxRole

from cardiac_ldm.report.headline import headline
from cardiac_ldm.report.live import embed, figure_html
from cardiac_ldm.report.tables import model_name

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PUBLISHED = ROOT / "book" / "executed"
"""The published study, whatever run a book is made of: prose speaks of it."""
ENDS = {"value": "", "low": "_low", "high": "_high"}
COMPARED = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
Json = Any
"""What lies somewhere in a JSON document."""
INTERVAL = "{value:.3g} [{low:.3g}, {high:.3g}]"
_EMBEDDED = re.compile(r'href="data:application/json;base64,([^"]+)"')
_STEP = re.compile(r"\[([^\]]*)\]|\.?([^.\[\]]+)")


@cache
def published() -> dict[str, Any]:
    """What the published chapters carry: `study`, each stage's metrics, and `printed`, the cells of their tables."""
    study: dict[str, list[dict[str, Any]]] = {}
    printed: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(PUBLISHED.glob("*.ipynb")):
        cells = printed.setdefault(path.stem, [])
        outputs = (o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", []))
        for text in (output.get("data", {}).get("text/html", "") for output in outputs):
            for name, data in re.findall(rf'download="([a-z-]+)-[0-9a-f]+\.json" {_EMBEDDED.pattern}', text):
                metrics = json.loads(base64.b64decode(data))
                if metrics not in study.setdefault(name, []):
                    study[name].append(metrics)
            if "<table" in text:
                cells.extend(_cells(text))
    return {"study": study, "printed": printed}


def _cells(table: str) -> Iterator[dict[str, Any]]:
    """A table's cells: row, column, text and, where it's a number, value, low and high."""
    columns: list[str] = []
    for line in BeautifulSoup(table, "html.parser").find_all("tr"):
        texts = [cell.get_text().strip() for cell in line.find_all(["th", "td"])]
        columns = columns or texts
        if not line.find("td"):
            continue
        for column, text in zip(columns[::-1], texts[::-1], strict=False):
            numbers = re.fullmatch(r"(-?[\d.e-]+)(?: \[(-?[\d.e-]+), (-?[\d.e-]+)\])?", text)
            known = (
                dict(zip(("value", "low", "high"), map(float, filter(None, numbers.groups())), strict=False))
                if numbers
                else {}
            )
            yield {"row": texts[0], "column": column, "text": text, **known}


def read(path: str) -> Json:
    """Return what lies at a path: `FILE.key[column=text, ...].key` of `benchmarks/results`, or of `published`.

    A choice in brackets has to leave one row; `null` stands for None and a number is compared as one.

    Raises:
        LookupError: nothing lies there, or more than one row.
    """
    name, _, rest = path.strip().partition(".")
    found: Json
    if name in published():
        found = published()[name]
    elif (RESULTS / f"{name}.json").exists():
        found = json.loads((RESULTS / f"{name}.json").read_text())
    else:
        raise LookupError(f"{path}: no {name}.json in benchmarks/results")
    for choice, key in _STEP.findall(rest):
        if not choice:
            found = found[0] if isinstance(found, list) and len(found) == 1 else found
            if not isinstance(found, dict) or key not in found:
                raise LookupError(f"{path}: no {key}")
            found = found[key]
            continue
        wanted = [part.partition("=")[::2] for part in choice.split(",")]
        rows = [row for row in found if all(_same(row.get(k.strip()), v.strip()) for k, v in wanted)]
        if len(rows) != 1:
            raise LookupError(f"{path}: {len(rows)} rows are [{choice}]")
        found = rows[0]
    return found


def _same(value: object, text: str) -> bool:
    if value is None or text == "null":
        return value is None and text == "null"
    try:
        return float(value) == float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value) == text


def _value(path: str) -> Json:
    """What lies at a path; of `PATH / PATH` and `PATH - PATH` the quotient and the difference."""
    for sign, combine in ((" / ", operator.truediv), (" - ", operator.sub)):
        if sign in path:
            return combine(*map(read, path.split(sign)))
    return read(path)


def said(text: str) -> str:
    """What `{value}` writes for `PATH` or `PATH = FORMAT`, a Python format of the row or number at that path."""
    path, _, pattern = text.partition(" = {")
    pattern = pattern and "{" + pattern
    found = _value(path)
    shown = (pattern or INTERVAL).format(**found) if isinstance(found, dict) else (pattern or "{:.3g}").format(found)
    return re.sub(r"(?<![\w.])-(?=[\d.])", "−", shown)


def claimed(text: str) -> str:
    """What `{claim}` writes: words, if `WORDS = A < B [and ...]` is so, or one of `LOW | BETWEEN | HIGH = PATH`.

    Raises:
        LookupError: a path leads nowhere.
        ValueError: the claim isn't so.
    """
    words, condition = text.split(" = ", 1)
    if "|" in words:
        row, (low, between, high) = read(condition), (word.strip() for word in words.split("|"))
        return low if row["high"] < 0 else high if row["low"] > 0 else between
    for part in condition.split(" and "):
        left, sign, right = re.split(r" (<=|>=|<|>) ", part)
        if not COMPARED[sign](_number(left), _number(right)):
            raise ValueError(f"{words!r} isn't so: {part} ({_number(left):.4g} and {_number(right):.4g})")
    return words


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float(read(text))


class Bound(SphinxRole):
    """A role whose text is read from results; hovering says from where."""

    def __init__(self, write: Callable[[str], str], kind: str) -> None:
        """write: from the role's text to what's shown. kind: class of the element."""
        super().__init__()
        self.write, self.kind = write, kind

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Write what was measured; warn where it isn't there, or isn't so."""
        self.env.note_dependency(str(RESULTS))
        try:
            shown = self.write(self.text)
        except (LookupError, ValueError) as error:
            return [], [self.inliner.reporter.warning(str(error), line=self.lineno)]
        path = (self.text.split(" = ", 1) if self.kind == "claim" else self.text.split(" = {", 1)[::-1])[-1]
        html = f'<span class="bk-{self.kind}" title="{nodes.unescape(path).replace(chr(34), "")}">{shown}</span>'
        return [nodes.raw(self.text, html.replace("&", "&amp;"), format="html")], []


def link_terms(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Link the first use of each of the glossary's terms on a page."""
    if docname == "glossary":
        return
    glossary = {
        name.lower(): anchor
        for name, _, kind, _, anchor, _ in app.env.get_domain("std").get_objects()
        if kind == "term"
    }
    if not glossary:
        return
    pattern = re.compile(
        rf"(?<![\w-])({'|'.join(sorted(map(re.escape, glossary), key=len, reverse=True))})(?![\w-])", re.I
    )
    used: set[str] = set()
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.paragraph | nodes.emphasis | nodes.strong) or _inside(
            text, nodes.title, nodes.reference
        ):
            continue
        parts, end = [], 0
        for match in pattern.finditer(text):
            anchor = glossary[match[0].lower()]
            if anchor in used:
                continue
            used.add(anchor)
            address = app.builder.get_relative_uri(docname, "glossary") + f"#{anchor}"
            link = nodes.reference("", match[0], internal=True, refuri=address, classes=["bk-term"])
            parts += [nodes.Text(text[end : match.start()]), link]
            end = match.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(text[end:])])


def _inside(node: nodes.Node, *kinds: type) -> bool:
    while node := node.parent:
        if isinstance(node, kinds):
            return True
    return False


def public_names(module: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes of a module that no underscore hides."""
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


class Reference(SphinxDirective):
    """Every public name of a package of the library, from its source: `{api} cardiac_ldm/privacy`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A section a module, an entry a name: signature and docstring."""
        package = ROOT / self.arguments[0]
        sections: list[nodes.Node] = []
        for path in sorted(package.rglob("*.py")) if self.arguments[0].count("/") else sorted(package.glob("*.py")):
            self.env.note_dependency(str(path))
            names = list(public_names(path))
            if not names:
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            section = nodes.section("", nodes.title("", name), ids=[nodes.make_id(name)])
            section += nodes.paragraph("", (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0])
            section += nodes.definition_list("", *(_entry(name, node) for node in names))
            sections.append(section)
        return sections


def _entry(module: str, node: ast.FunctionDef | ast.ClassDef) -> nodes.definition_list_item:
    """A name with its arguments, and what its docstring says, its paragraphs kept."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        shown = f"{node.name}({ast.unparse(node.args)}){returns}"
    else:
        methods = [
            part.name for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")
        ]
        shown = f"class {node.name}" + (f": {', '.join(methods)}" if methods else "")
    first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
    term = nodes.term("", "", nodes.literal("", shown), ids=[nodes.make_id(f"{module}.{node.name}")])
    about = nodes.definition("", nodes.paragraph("", first.replace("\n", " ").replace("`", "")))
    if rest:
        about += nodes.literal_block(rest, rest, language="text")
    return nodes.definition_list_item("", term, about)


class Headline(SphinxDirective):
    """The figure of page one: `benchmarks.private_recipe`, and the paired differences of chapter 04."""

    def run(self) -> list[nodes.Node]:
        """Draw it as every figure of the book is drawn."""
        recipe = read("private_recipe.private")
        starts = {"all": "pre-trained, all weights tuned", "": "from scratch"}
        rows = sorted([*recipe["rows"], recipe["scratch"] | {"tuned": ""}], key=lambda row: float(row["epsilon"]))
        points = pd.DataFrame(
            {"model": model_name(float(row["epsilon"])), "start": starts.get(row["tuned"], "pre-trained")}
            | {name: row[f"fd{end}"] for name, end in ENDS.items()}
            for row in rows
        )
        tail = " less public data only"
        cells = (
            c for c in published()["printed"]["04_evaluate"] if c["row"] == "FD-EffNet" and c["column"].endswith(tail)
        )
        changes = pd.DataFrame(cell | {"model": cell["column"].removesuffix(tail)} for cell in cells)
        changes = changes.sort_values("model", key=lambda names: names.map(list(points["model"]).index))
        floor = read("study.evaluate[epsilon=0].rows[metric=FD-EffNet,grouping=null]")
        references = {
            "reconstructions (ceiling)": tuple(recipe[f"ceiling_fd{end}"] for end in ENDS.values()),
            "halves of the patients (floor)": tuple(floor[f"reference{end}"] for end in ENDS.values()),
        }
        figure = headline(points, changes, references)
        return made_by(figure_html(figure.to_dict()), "python -m benchmarks.private_recipe private", "private_recipe")


class Dial(SphinxDirective):
    """The epsilon dial: each model's sample for one condition, what its budget means, and what was measured of it."""

    def run(self) -> list[nodes.Node]:
        """Take the volumes from the published gallery, and all numbers from the metrics that its chapters carry."""
        viewer = next(
            text
            for cell in nbformat.read(PUBLISHED / "07_gallery.ipynb", 4).cells
            for output in cell.get("outputs", [])
            if "bk-volumes" in (text := output.get("data", {}).get("text/html", ""))
        )
        volumes = json.loads(viewer.split('<script type="application/json">')[1].split("</script>")[0])["volumes"]
        runs = [float(run["epsilon"]) for run in published()["study"]["evaluate"] if run["epsilon"] is not None]
        budgets = {model_name(epsilon): epsilon for epsilon in runs}
        models = [
            {
                "title": v["title"],
                "nifti": v["nifti"],
                "words": meant(budgets[v["title"]]),
                "measures": _measures(v["title"]),
            }
            for v in volumes
            if v["phase"] == "ED"
        ]
        payload = json.dumps({"badge": "synthetic", "models": models})
        alt = "Samples of models with different privacy budgets for one condition, and what was measured of each"
        return [nodes.raw("", embed("bk-dial", payload, 700, alt), format="html")]


def meant(epsilon: float) -> str:
    """What a budget means, in words."""
    if epsilon == 0:
        return "Trained on public patients only: no private patient can be found out by it."
    if math.isinf(epsilon):
        return "No privacy: nothing bounds what this model may give away of a patient."
    factor, right = math.exp(epsilon), 1 / (1 + math.exp(-epsilon))
    return (
        f"ε = {epsilon:g}: adding or removing one patient changes the probability of any outcome by a factor of at "
        f"most {format(factor, '.1f' if factor < 100 else ',.0f')} (but for δ). Whoever knows all other patients "
        f"and gives even odds to one's having taken part is right with a probability of at most {right:.2%}."
        + (" That is a weak promise." if factor > 100 else "")
    )


def _measures(model: str) -> list[dict[str, str]]:
    """What the dial shows of a model: a name, its value and the patients'."""
    study = published()["study"]
    run = next(r for r in study["evaluate"] if r["epsilon"] is not None and model_name(float(r["epsilon"])) == model)
    shown = {
        "FD-EffNet (lower is better)": ("FD-EffNet", None, 0),
        "coverage (higher is better)": ("coverage", None, 2),
        "correlation of LVEDV, requested and measured": ("correlation", "LVEDV", 2),
        "bias of LVEDV, mL": ("bias", "LVEDV", 1),
        "correlation of LVEF": ("correlation", "LVEF", 2),
    }
    measures = []
    for name, (metric, attribute, places) in shown.items():
        row = next(r for r in run["rows"] if (r["metric"], r["attribute"], r["grouping"]) == (metric, attribute, None))
        value = f"{row['value']:.{places}f} [{row['low']:.{places}f}, {row['high']:.{places}f}]".replace("-", "−")
        measures.append({"name": name, "value": value, "patients": f"{row['reference']:.{places}f}"})
    dice = [
        c
        for c in published()["printed"]["04_evaluate"]
        if (c["row"], c["column"]) == (f"synthetic ({model})", "Dice myocardium")
    ]
    measures += [
        {"name": "Dice (myocardium) of a segmenter trained on samples", "value": c["text"], "patients": ""}
        for c in dice
    ]
    for attack in study["attack"]:
        if model_name(float(attack["epsilon"])) == model:
            row = next(r for r in attack["membership"] if (r["attack"], r["measure"]) == ("loss", "auc"))
            value = f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            measures.append({"name": "membership inference, AUC (0.5 is chance)", "value": value, "patients": ""})
    for audit in study["audit"]:
        if model_name(float(audit["epsilon"])) == model:
            bound = max(row["shown"] for row in audit["rows"] if row["noise"] == 1)
            measures.append({"name": "audit: largest lower bound on ε", "value": f"{bound:.2f}", "patients": ""})
    return measures


class Motion(SphinxDirective):
    """The mechanism in motion: clipping and noise on a handful of made-up patients."""

    def run(self) -> list[nodes.Node]:
        """The book's script draws it."""
        alt = "Clipping and noise on the gradients of a handful of made-up patients, with sliders"
        return [nodes.raw("", f'<div class="bk-mechanism" role="group" aria-label="{alt}"></div>', format="html")]


def made_by(html: str, command: str, result: str) -> list[nodes.Node]:
    """A figure's element, and under it what made it and its data."""
    address = f"data:application/json;base64,{base64.b64encode((RESULTS / f'{result}.json').read_bytes()).decode()}"
    link = f'<a download="{result}.json" href="{address}">{result}.json</a>'
    return [nodes.raw("", f"{html}<p><small>Made by <code>{command}</code>; data: {link}.</small></p>", format="html")]


def note_results(
    app: Sphinx, env: BuildEnvironment, added: Iterable[str], changed: Iterable[str], removed: Iterable[str]
) -> list[str]:
    """Read pages with bound numbers anew each time: what they're bound to may be new."""
    return [name for name in env.found_docs if re.search(r"\{(value|claim)\}", Path(env.doc2path(name)).read_text())]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    published.cache_clear()
    app.add_role("value", Bound(said, "value"))
    app.add_role("claim", Bound(claimed, "claim"))
    app.add_directive("api", Reference)
    app.add_directive("headline", Headline)
    app.add_directive("dial", Dial)
    app.add_directive("motion", Motion)
    app.connect("env-get-outdated", note_results)
    app.connect("doctree-resolved", link_terms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
