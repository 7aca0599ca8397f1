"""Sphinx extension: local figures, folded code, and titles that tell the runs of a stage apart."""

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

ASSETS = Path(__file__).parents[1] / "assets"
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


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx; titles are collected at priority 500, so they're amended before that."""
    app.connect("config-inited", serve_assets, priority=10)
    app.connect("source-read", fold_code)
    app.connect("doctree-read", name_run, priority=100)
    app.connect("html-page-context", drop_thebe)
    app.add_css_file("book.css")
    app.add_js_file("figures.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
