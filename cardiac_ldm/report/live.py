"""How an output shows: in the book, whose own script draws it, and in a live notebook, where it brings that along."""

import base64
import gzip
import json
from functools import cache
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


def loader(kind: Literal["bk-volumes", "bk-plot"]) -> str:
    """Return the HTML that makes a live page draw its figures of one kind: their library, the book's script and style.

    It loads nothing over the network, and a page unpacks a library once. Without NiiVue, which the book's set-up
    fetches, it says so in a sentence.
    """
    library = PLOTLY if kind == "bk-plot" else NIIVUE
    path = Path(plotly.__file__).parent / "package_data" / PLOTLY if library == PLOTLY else ASSETS / library
    if not path.exists():
        return "<p>The volumes stand still without NiiVue; <code>python book/_ext/vendored.py</code> fetches it.</p>"
    # the names of module systems are hidden from the library: classic Notebook's would swallow it
    return f"""<style>{(ASSETS / "book.css").read_text()}</style>
<script>
(window.bkLibraries ??= {{}})["{library}"] ??= (async () => {{
  const packed = Uint8Array.from(atob("{_packed(path)}"), (letter) => letter.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  new Function("define", "exports", "module", await new Response(unpacked).text())();
}})();
if (!window.drawFigures) {{
{(ASSETS / "figures.js").read_text()}
}}
drawFigures(".{kind}");
</script>"""


@cache
def _packed(path: Path) -> str:
    return base64.b64encode(gzip.compress(path.read_bytes(), mtime=0)).decode()


def embed(kind: str, payload: str, height: int, poster: str = "") -> str:
    """Return the HTML in which the book's script finds a figure.

    kind: its class. payload: JSON. height: pixels to keep free. poster: HTML shown until it's drawn.
    """
    data = payload.replace("<", "\\u003c")  # nothing in the data may end the script element
    script = f'<script type="application/json">{data}</script>'
    return f'<div class="{kind}" style="min-height: {height}px">{script}{poster}</div>'


CONFIG = {"displaylogo": False, "responsive": True, "showSendToCloud": False}
"""How plotly shows a figure: with no button that uploads it, which it has by default."""


class BookRenderer(MimetypeRenderer):
    """Shows a figure the way the book draws it, with plotly's own mimetype beside it for live notebooks."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the figure as `text/html` and as plotly's JSON."""
        figure = pio.to_json({**fig_dict, "config": CONFIG}, validate=False)
        html = embed("bk-plot", figure, fig_dict["layout"].get("height", 450))
        if front_end() == "classic":  # the one that doesn't know plotly's mimetype
            html += loader("bk-plot")
        return {"application/vnd.plotly.v1+json": json.loads(figure), "text/html": html}
