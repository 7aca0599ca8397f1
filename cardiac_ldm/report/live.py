"""How an output shows: in the book, whose own script draws it, and in a live notebook, where it brings that along."""

import base64
import gzip
import json
import re
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal

import plotly
import plotly.io as pio
from IPython.core.getipython import get_ipython
from plotly.io.base_renderers import MimetypeRenderer

ASSETS = Path(__file__).resolve().parents[2] / "book" / "assets"
"""The book's scripts; `vendor/` holds the libraries that the book's set-up fetched, plotly's comes with its package."""
PLOTLY, NIIVUE = "plotly.min.js", "vendor/niivue/niivue.umd.js"
"""What the book's script calls its libraries."""


def front_end() -> Literal["classic", "other"] | None:
    """Return who runs this cell: classic Notebook, another front end that a person sees, or nobody who looks (None).

    papermill, nbclient and all other clients written in Python number their messages after their session. Front ends
    that live in a browser (JupyterLab, Notebook 7, VS Code) give each message an identifier of its own, and classic
    Notebook alone calls its user "username".
    """
    shell = get_ipython()
    header = shell.get_parent().get("header", {}) if hasattr(shell, "get_parent") else {}
    if not header or header["msg_id"].startswith(header["session"]):
        return None
    return "classic" if header["username"] == "username" else "other"


def loader(kind: Literal["bk-volumes", "bk-levels", "bk-plot"]) -> str:
    """Return the HTML that makes a live page draw its figures of one kind: their library, the book's script and style.

    It loads nothing over the network, and a page unpacks a library once. Without NiiVue, which the book's set-up
    fetches, it says so in a sentence.
    """
    library = {"bk-plot": PLOTLY, "bk-volumes": NIIVUE}.get(kind)
    path = Path(plotly.__file__).parent / "package_data" / PLOTLY if library == PLOTLY else ASSETS / (library or "")
    if not path.exists():
        return "<p>The volumes stand still without NiiVue; <code>python book/_ext/vendored.py</code> fetches it.</p>"
    # the names of module systems are hidden from the library: classic Notebook's would swallow it
    unpack = (
        library
        and f"""
window.bkLibraries["{library}"] ??= (async () => {{
  const packed = Uint8Array.from(atob("{_packed(path)}"), (letter) => letter.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  new Function("define", "exports", "module", await new Response(unpacked).text())();
}})();"""
    )
    return f"""<style>{(ASSETS / "book.css").read_text()}</style>
<script>
window.bkLibraries ??= {{}};{unpack or ""}
if (!window.drawFigures) {{
{(ASSETS / "figures.js").read_text()}
}}
drawFigures(".{kind}");
</script>"""


@cache
def _packed(path: Path) -> str:
    return base64.b64encode(gzip.compress(path.read_bytes(), mtime=0)).decode()


def embed(kind: str, payload: str, height: int, alt: str, poster: str = "") -> str:
    """Return the HTML in which the book's script finds a figure.

    kind: its class. payload: JSON. height: pixels to keep free. alt: what it shows, in words. poster: HTML shown until
    it's drawn, in print, and where no script runs.
    """
    data = payload.replace("<", "\\u003c")  # nothing in the data may end the script element
    script = f'<script type="application/json">{data}</script>'
    label = f'role="group" aria-label="{escape(alt)}"'
    return f'<div class="{kind}" {label} style="min-height: {height}px">{script}{poster}</div>'


CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
}
"""How plotly shows a figure: with no button that uploads it, which it has by default."""


def alt_text(figure: Mapping[str, Any]) -> str:
    """What a figure shows, in words: its `meta.alt` or `meta.caption`, or its panels, axes and series."""
    layout = figure.get("layout", {})
    meta = layout.get("meta") or {}
    if alt := meta.get("alt") or meta.get("caption"):
        return str(alt)
    axes = [
        layout[name].get("title", {}).get("text", "") for name in sorted(layout) if re.fullmatch(r"[xy]axis\d*", name)
    ]
    panels = [note.get("text", "") for note in layout.get("annotations", ())]
    series = [trace.get("name", "") for trace in figure.get("data", ())]
    found = {"Plot": panels, "axes": axes, "series": series}
    parts = [f"{what}: {', '.join(dict.fromkeys(filter(None, names)))}" for what, names in found.items() if any(names)]
    return re.sub("<[^>]+>", " ", "; ".join(parts)) or "Plot"


def wall_html(figure: Mapping[str, Any]) -> str:
    """Return a picture with captions as an element that needs no script; `meta` says where they stand, in per cent."""
    meta, alt = figure["layout"]["meta"], escape(alt_text(figure))
    texts = "".join(
        f'<span style="left: {x}%; top: {y}%">{escape(text)}</span>' for x, y, text in meta["captions"] if text
    )
    shown = (
        f'<img alt="{alt}" src="{figure["data"][0]["source"]}">{texts}<b class="bk-badge">{escape(meta["badge"])}</b>'
    )
    return f'<div class="bk-wall" role="group" aria-label="{alt}">{shown}</div>'


def figure_html(figure: Mapping[str, Any]) -> str:
    """Return a plotly figure, as its `to_dict`, as the book draws it, with its caption."""
    layout = figure["layout"]
    meta = layout.get("meta") or {}
    if "captions" in meta:
        return wall_html(figure)
    caption = meta.get("caption", "")
    told = f'<p class="bk-caption">{escape(caption)}</p>' if caption else ""
    payload = pio.to_json({**figure, "config": CONFIG}, validate=False)
    return embed("bk-plot", payload, layout.get("height", 450), alt_text(figure), told)


class BookRenderer(MimetypeRenderer):
    """Shows a figure the way the book draws it, with plotly's own mimetype beside it for live notebooks."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the figure as `text/html` and as plotly's JSON."""
        figure = pio.to_json({**fig_dict, "config": CONFIG}, validate=False)
        html = figure_html(fig_dict)
        if front_end() == "classic":  # the one that doesn't know plotly's mimetype
            html += loader("bk-plot")
        return {"application/vnd.plotly.v1+json": json.loads(figure), "text/html": html}
