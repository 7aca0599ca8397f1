"""Sphinx extension: local figures, folded code, titles that tell the runs of a stage apart, tables of measurements.

It fetches what the figures are drawn with, and fails a build that lost a page or a figure.
"""

import base64
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import plotly
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.directives.code import LiteralInclude
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from vendored import VENDOR, fetch, sources

from cardiac_ldm.errors import StudyError

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "book" / "assets"
RESULTS = ROOT / "benchmarks" / "results"
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
DOWNLOAD = re.compile(r'(<a download="([\w.-]+)" href=")data:application/json;base64,([^"]+)"')
"""A run's metrics, as a notebook carries them (`report.tables.source`)."""
BUDGETS = {"0": "public data only", "inf": "no privacy"}


def serve_assets(app: Sphinx, config: Config) -> None:
    """Copy `assets/` to `_static/`; from `_config.yml`, jupyter-book would put every script in it on every page."""
    config.html_static_path += [str(ASSETS), str(PLOTLY)]


def fetch_assets(app: Sphinx) -> None:
    """Fetch what volumes and equations are drawn with, when HTML is built; pages without it say what they lack."""
    if app.builder.format != "html":
        return
    try:
        fetch()
    except (StudyError, OSError) as error:  # no warning: the book is complete but for this
        logging.getLogger(__name__).info("%s\nVolumes won't turn, or equations won't be set; the pages say so.", error)


def write_again(app: Sphinx, env: BuildEnvironment) -> Iterable[str]:
    """Write all pages when what lies in `assets/vendor/` is new: Sphinx copies assets only when it writes a page."""
    return env.found_docs if sources(Path(app.outdir, "_static", VENDOR.name)) != sources(VENDOR) else []


def introduce(app: Sphinx, docname: str, source: list[str]) -> None:
    """Say at the top of the first page whose run the book shows, when it isn't the published study."""
    if docname == app.config.root_doc and app.config.own_run is not None:
        title, _, text = source[0].partition("\n")
        note = (
            f":::{{note}}\nThis book shows your own run{app.config.own_run}: that is what the chapters from the cohorts"
            " to the gallery measured. What is said elsewhere, the findings on this page included, is about the"
            " published study.\n:::"
        )
        source[0] = f"{title}\n\n{note}\n{text}"


def fold_code(app: Sphinx, docname: str, source: list[str]) -> None:
    """Fold the code of every notebook cell and leave out which stages it ran, so that a chapter reads as one."""
    if not app.env.doc2path(docname).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]
            cell["outputs"] = [output for output in cell["outputs"] if not _told_of_stages(output)]
    source[0] = json.dumps(notebook)


def _told_of_stages(output: dict[str, Any]) -> bool:
    """Whether an output only says which stages were run (`runs.Stage.complete`)."""
    lines = "".join(output.get("text", "")).splitlines()
    return bool(lines) and all(" not done yet with these settings; running it in " in line for line in lines)


def link_metrics(app: Sphinx, docname: str, source: list[str]) -> None:
    """Link the metrics that a notebook carries instead of carrying them on its page; `write_metrics` writes them."""
    if app.builder.format != "html" or not app.env.doc2path(docname).endswith(".ipynb"):
        return
    notebook = nbformat.reads(source[0], 4)
    root = "../" * docname.count("/")
    for data in _shown(notebook):
        data["text/html"] = DOWNLOAD.sub(rf'\1{root}runs/\2"', data["text/html"])
    source[0] = nbformat.writes(notebook)


def write_metrics(app: Sphinx, exception: Exception | None) -> None:
    """Write what `link_metrics` links: the metrics of each run that the book's notebooks carry."""
    if exception is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir, "runs")
    folder.mkdir(exist_ok=True)
    for path in Path(app.srcdir).glob("executed/*.ipynb"):
        for data in _shown(nbformat.read(path, 4)):
            for _, name, content in DOWNLOAD.findall(data["text/html"]):
                (folder / name).write_bytes(base64.b64decode(content))


def _shown(notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    """The outputs of a notebook that are HTML."""
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [data for data in outputs if "text/html" in data]


def name_run(app: Sphinx, doctree: nodes.document) -> None:
    """Say the privacy budget in the title of a chapter that's there once per budget (`03_dp_finetune-eps1`)."""
    run = re.search(r"-eps([^-/]+)$", app.env.docname)
    title = next(doctree.findall(nodes.title), None)
    if run and title is not None:
        title += nodes.Text(f", {BUDGETS.get(run[1], f'ε = {run[1]}')}")


def drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Drop the settings for live code, which jupyter-book declares twice: that is an error in the browser."""
    scripts = context["script_files"]
    context["script_files"] = [s for s in scripts if "THEBE_JS_URL" not in (s.attributes.get("body") or "")]


def check_pages(book: Path, html: Path) -> None:
    """Raise ExtensionError unless every chapter of a book has its page, and every figure of a notebook is on it."""
    for source in [*book.glob("*.md"), *book.glob("executed/*.ipynb")]:
        page = (html / source.relative_to(book)).with_suffix(".html")
        if not page.exists():
            raise ExtensionError(f"{page}: the build made no such page; does _toc.yml name {source.name}?")
        if source.suffix == ".ipynb":
            outputs = [o for cell in nbformat.read(source, 4).cells for o in cell.get("outputs", [])]
            if any(output.output_type == "error" for output in outputs):
                raise ExtensionError(f"{source}: its execution ended in an error; run the study again")
            figures = sum("bk-" in output.get("data", {}).get("text/html", "")[:20] for output in outputs)
            written = page.read_text()
            if written.count('<div class="bk-') != figures or (outputs and "cell_output" not in written):
                raise ExtensionError(f"{page}: outputs of the notebook are missing ({figures} figures expected)")


def check_built(app: Sphinx, exception: Exception | None) -> None:
    """Check what was built, when it's the book as it is read."""
    if exception is None and app.builder.name == "html":
        check_pages(Path(app.srcdir), Path(app.outdir))


class Library(LiteralInclude):
    """A file of the repository, named from its root: `{library} cardiac_ldm/privacy/dpsgd.py`."""

    def run(self) -> list[nodes.Node]:
        """Find the file wherever the book lies, then do as `literalinclude` does."""
        page = Path(self.env.doc2path(self.env.docname)).resolve().parent
        self.arguments[0] = os.path.relpath(ROOT / self.arguments[0], page)
        return super().run()


class Results(SphinxDirective):
    """A table of what a benchmark measured: `{results} dp_step.rows`, then a line `title = format` for every column."""

    has_content = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Read the benchmark's JSON; the page is built again when it changes."""
        name, _, key = self.arguments[0].partition(".")
        path = RESULTS / f"{name}.json"
        self.env.note_dependency(str(path))
        found = json.loads(path.read_text())
        for part in key.split("."):
            found = found[part]
        titles, cells = zip(*(line.split(" = ", 1) for line in self.content), strict=True)
        rows = [[cell.format(**row) for cell in cells] for row in (found if isinstance(found, list) else [found])]
        table = [titles, ["---"] * len(titles), *rows]
        text = "\n".join(f"| {' | '.join(row)} |" for row in table)
        command, _, profile = name.rpartition("_")
        settings = RESULTS.parent / f"{profile}.yaml"
        command = f"{command} --profile benchmarks/{settings.name}" if settings.exists() else name
        return self.parse_text_to_nodes(f"{text}\n\n<small>Made by `python -m benchmarks.{command}`.</small>")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx; titles are collected at priority 500, so they're amended before that."""
    app.add_config_value("own_run", None, "env", [str])
    app.connect("config-inited", serve_assets, priority=10)
    app.connect("builder-inited", fetch_assets)
    app.connect("source-read", introduce)
    app.connect("source-read", fold_code)
    app.connect("source-read", link_metrics)
    app.connect("doctree-read", name_run, priority=100)
    app.connect("env-updated", write_again)
    app.connect("html-page-context", drop_thebe)
    app.connect("build-finished", write_metrics)
    app.connect("build-finished", check_built)
    app.add_directive("library", Library)
    app.add_directive("results", Results)
    app.add_css_file("book.css")
    app.add_js_file("figures.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
