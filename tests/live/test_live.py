"""Live notebooks, as a person opens them: the real itkwidgets, classic Notebook and JupyterLab, in a real browser.

They need an environment of their own, which `make test-live` sets up: itkwidgets alone brings more than a gigabyte, and
downgrades what the study runs on.
"""

import base64
import gzip
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import nbformat
import nibabel as nib
import numpy as np
import papermill
import pytest
import zstandard
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.session import Session
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from cardiac_ldm.cohort import GRID
from cardiac_ldm.report.live import ASSETS, NIIVUE
from cardiac_ldm.report.viewer import nifti
from cardiac_ldm.trained import ROOT

CHROMIUM = ["--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
PATIENT = """
from cardiac_ldm.cohort import load_manifest
from cardiac_ldm.cohort.grid import place_on_grid
from cardiac_ldm.cohort.readers import read_patient
patient = place_on_grid(read_patient(load_manifest("phantom_public"), None, "p000000"))"""
CELLS = [
    f"{PATIENT}\nfrom cardiac_ldm.report import viewer, walls",
    "viewer.view(patient.images[0], patient.labels[0])",
    'viewer.show_synthetic(patient.images[:2], ["ED", "ES"])',
    'walls.synthetic_wall(patient.images[:2], ["ED", "ES"])',
    "import plotly.graph_objects as go\ngo.Figure(go.Scatter(y=[1, 2]))",
]
SERVERS = {
    "lab": ["jupyterlab", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
    "classic": ["notebook"],
}


class FrontEnd(Session):
    """Messages as a browser's: each has an identifier of its own, where Python's clients number theirs."""

    @property
    def msg_id(self) -> str:
        return uuid4().hex


def notebook() -> NotebookNode:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=[new_code_cell(cell.strip()) for cell in CELLS], metadata=kernel)


def outputs(executed: NotebookNode) -> list[dict]:
    """What the cells returned, by mimetype."""
    return [output["data"] for cell in executed.cells for output in cell.get("outputs", []) if "data" in output]


@pytest.fixture(scope="module", autouse=True)
def _vendored() -> None:
    assert (ASSETS / NIIVUE).exists(), f"book/assets lacks {NIIVUE}: python book/_ext/vendored.py fetches it"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert executable, "no Chromium to open notebooks in: apt-get install chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, browser: Browser
) -> Iterator[Page]:
    """The notebook in a front end, with all its cells run; a page that asks for anything beyond this machine fails."""
    folder = tmp_path_factory.mktemp(request.param)
    nbformat.write(notebook(), folder / "heart.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(tmp_path_factory.mktemp(name)) for name in ("CONFIG", "DATA", "RUNTIME")}
    options = [f"--port={port}", "--ip=127.0.0.1", "--no-browser", "--allow-root", f"--notebook-dir={folder}"]
    app = "NotebookApp" if request.param == "classic" else "ServerApp"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *SERVERS[request.param], *options, f"--{app}.token=", f"--{app}.password="],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | own,
        )
    try:
        root = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{root}/api", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.5)
        context = browser.new_context(viewport={"width": 1000, "height": 900})
        page = context.new_page()
        left: list[str] = []

        def answer(route):
            url = urlsplit(route.request.url)
            if url.scheme in ("data", "blob") or url.hostname == "127.0.0.1":
                route.continue_()
            else:
                left.append(route.request.url)
                route.abort()

        page.route("**/*", answer)
        if request.param == "lab":
            page.goto(f"{root}/lab/tree/heart.ipynb")
            page.locator(".jp-Notebook").wait_for(timeout=60_000)
            page.locator("#jp-main-statusbar", has_text="(ipykernel) | Idle").wait_for(timeout=60_000)
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        else:
            page.goto(f"{root}/notebooks/heart.ipynb")
            page.wait_for_function("window.Jupyter?.notebook?.kernel?.widget_manager", timeout=60_000)
            page.wait_for_function("Jupyter.notebook.kernel.is_connected()", timeout=20_000)
            page.wait_for_timeout(5000)  # by then, extensions have registered what they show
            page.evaluate("Jupyter.notebook.execute_all_cells()")
        yield page
        context.close()
        assert not left
    finally:
        server.terminate()
        server.wait(30)


def pixels(place: Locator) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(place.screenshot(timeout=150_000))).convert("RGB"), int)


def settled(place: Locator, before: np.ndarray | None = None) -> np.ndarray:
    """A picture of part of a page once it stands still, and differs from `before`."""
    place.scroll_into_view_if_needed(timeout=120_000)
    last = None
    for _ in range(120):
        now = pixels(place)
        if (
            last is not None
            and np.array_equal(now, last)
            and now.max() > 0
            and (before is None or not np.array_equal(now, before))
        ):
            return now
        last = now
        place.page.wait_for_timeout(500)
    raise AssertionError("the picture did not change, stays black or does not settle")


def dragged(canvas: Locator) -> np.ndarray:
    """What a canvas shows after its left part, where the 3D view is, was dragged."""
    before = settled(canvas)
    box = canvas.bounding_box()
    assert box
    mouse = canvas.page.mouse
    x, y = box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"]
    mouse.move(x, y)
    mouse.down()
    mouse.move(x + 60, y + 20, steps=5)
    mouse.up()
    return settled(canvas, before)


def coloured(picture: np.ndarray) -> np.ndarray:
    """The share of pixels that aren't grey: red, green, blue. Labels lie over grey, in colours that everybody tells."""
    others = (picture.sum(axis=-1, keepdims=True) - picture) / 2
    return (picture > 1.2 * others + 5).mean(axis=(0, 1))


def run_as(username: str, cells: NotebookNode, folder: Path) -> NotebookNode:
    """Run a notebook as the front end does that gives its user this name, and keep the state of its widgets."""
    manager = AsyncKernelManager(kernel_name="python3", session=FrontEnd(username=username))
    return NotebookClient(cells, km=manager, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


def at(labels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The middle of the right ventricle, in mm, of labels (x, y, z) whose affine leads to RAS."""
    return nib.affines.apply_affine(affine, np.argwhere(labels == 1).mean(axis=0))


def test_classic_notebook_gets_itkwidgets_with_the_studys_spacing_and_the_labels_where_they_belong(tmp_path: Path):
    scope: dict = {}
    exec(PATIENT, scope)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(nifti(scope["patient"].labels[0])))
    executed = run_as("username", notebook(), tmp_path)
    (shown,) = [o for o in outputs(executed) if "application/vnd.jupyter.widget-view+json" in o]
    model = shown["application/vnd.jupyter.widget-view+json"]["model_id"]
    widget = executed.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"][model]
    assert widget["model_module"] == "itkwidgets"
    buffers = {tuple(buffer["path"]): base64.b64decode(buffer["data"]) for buffer in widget["buffers"]}
    for which in ("rendered_image", "rendered_label_image"):
        state = widget["state"][which]
        np.testing.assert_allclose(state["spacing"], GRID.spacing_mm[::-1], rtol=1e-6)
        assert state["size"] == [96, 96, 13]
        voxels = zstandard.ZstdDecompressor().decompress(buffers[which, "compressedData"], max_output_size=96 * 96 * 13)
        assert len(np.unique(np.frombuffer(voxels, np.uint8))) == 4 or which == "rendered_image"
    lps = np.diag([*state["spacing"], 1.0])
    lps[:3, 3] = state["origin"]
    assert np.array_equal(state["direction"]["data"], np.eye(3).ravel())
    labels = np.frombuffer(voxels, np.uint8).reshape(13, 96, 96).transpose(2, 1, 0)
    np.testing.assert_allclose(
        at(labels, np.diag([-1, -1, 1, 1]) @ lps), at(np.asarray(image.dataobj), image.affine), atol=1e-3
    )


def test_what_papermill_writes_stays_light_even_with_itkwidgets_installed(tmp_path: Path):
    nbformat.write(notebook(), tmp_path / "in.ipynb")
    papermill.execute_notebook(str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), progress_bar=False)
    volumes = [o["text/html"] for o in outputs(nbformat.read(tmp_path / "out.ipynb", 4)) if "text/html" in o]
    assert len(volumes) == 4
    assert not any("drawFigures" in html or "widget-view" in html for html in volumes)
    assert (tmp_path / "out.ipynb").stat().st_size < 1_500_000


@pytest.mark.parametrize("opened", ["lab"], indirect=True)
def test_in_jupyterlab_volumes_turn_and_labels_are_coloured(opened: Page):
    viewers = opened.locator(".bk-volumes canvas")
    viewers.first.wait_for(timeout=120_000)
    opened.locator(".bk-volumes").nth(1).scroll_into_view_if_needed()
    assert (coloured(settled(viewers.nth(0))) > 0.005).all()  # labels: red, green and blue
    assert (coloured(settled(viewers.nth(1))) < 0.005).all()
    dragged(viewers.nth(0))
    dragged(viewers.nth(1))
    opened.locator(".js-plotly-plot svg.main-svg").first.wait_for(timeout=20_000)


@pytest.mark.parametrize("opened", ["classic"], indirect=True)
def test_in_classic_notebook_itkwidgets_and_niivue_show_pixels(opened: Page):
    canvases = opened.locator(".cell").nth(1).locator("canvas")
    canvases.first.wait_for(state="attached", timeout=120_000)
    sizes = [box["width"] * box["height"] if (box := c.bounding_box()) else 0 for c in canvases.all()]
    shown = settled(canvases.nth(int(np.argmax(sizes))))
    heart = shown[abs(shown - shown[2, 2]).max(axis=-1) > 20]  # what isn't background
    assert len(heart) > 0.02 * shown[..., 0].size
    assert np.ptp(heart) > 50
    niivue = opened.locator(".bk-volumes")
    niivue.scroll_into_view_if_needed(timeout=120_000)
    niivue.locator("canvas").first.wait_for(timeout=120_000)
    dragged(niivue.locator("canvas").first)
    assert np.ptp(settled(opened.locator(".bk-wall img"))) > 50
    opened.locator(".bk-plot").scroll_into_view_if_needed(timeout=120_000)
    opened.locator(".bk-plot svg.main-svg").first.wait_for(timeout=60_000)


def test_every_chapter_runs_cell_by_cell_and_its_volumes_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(tmp_path))
    turn = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        chapter = nbformat.read(path, 4)
        (parameters,) = [cell for cell in chapter.cells if "parameters" in cell.metadata.get("tags", [])]
        parameters.source += f'\nprofile = "{ROOT / "tests" / "tiny.yaml"}"\n__vsc_ipynb_file__ = "{path}"'  # VS Code's
        for name, value in {"epsilon": "1", "epsilons": '"1"' if path.stem.startswith("05") else '"0, 1"'}.items():
            if f"\n{name} = " in parameters.source:
                parameters.source += f"\n{name} = {value}"
        executed = run_as("", chapter, path.parent)
        html = [o.get("text/html", "") for o in outputs(executed)]
        turn[path.stem[:2]] = sum("bk-volumes" in h for h in html)
        assert turn[path.stem[:2]] == sum("drawFigures" in h for h in html)
    assert turn["00"] == turn["07"] == 2
