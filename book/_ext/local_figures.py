"""Sphinx extension: local figures, folded code, titles that tell the runs of a stage apart, tables of measurements."""

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective

ASSETS = Path(__file__).parents[1] / "assets"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BUDGETS = {"0": "public data only", "inf": "no privacy"}


def serve_assets(app: Sphinx, config: Config) -> None:
    """Copy `assets/` to `_static/`; from `_config.yml`, jupyter-book would put every script in it on every page."""
    config.html_static_path.append(str(ASSETS))


def fold_code(app: Sphinx, docname: str, source: list[str]) -> None:
    """Fold the code of every notebook cell, so that a chapter reads as one."""
    if not app.env.doc2path(docname).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]
    source[0] = json.dumps(notebook)


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
    app.connect("config-inited", serve_assets, priority=10)
    app.connect("source-read", fold_code)
    app.connect("doctree-read", name_run, priority=100)
    app.connect("html-page-context", drop_thebe)
    app.add_directive("results", Results)
    app.add_css_file("book.css")
    app.add_js_file("figures.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
