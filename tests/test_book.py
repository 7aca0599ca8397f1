"""The book, built as a reader gets it and driven in a browser that reaches nothing but the book's own files."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import nbformat
import numpy as np
import papermill
import pytest
from _plotly_utils import png  # type: ignore[import-untyped]
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import Browser, Page, sync_playwright

from cardiac_ldm.errors import StudyError
from cardiac_ldm.report.viewer import show_synthetic

BOOK = Path(__file__).parents[1] / "book"
CHROMIUM = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
]
CHAPTERS = ["00_cohorts", "03_dp_finetune-eps1", "03_dp_finetune-epsinf", "06_tradeoff", "07_gallery"]
CHAPTER = [
    new_markdown_cell("# A chapter\n\n$$ g = \\frac{1}{B} \\sum_i g_i $$"),
    new_code_cell("""
import numpy as np, sys
import plotly.graph_objects as go
from cardiac_ldm.report import figures, viewer
print("progress", file=sys.stderr)
go.Figure(go.Scatter(y=[1, 3, 2]))"""),
    new_code_cell("""
z, y, x = np.mgrid[-1:1:13j, -1:1:96j, -1:1:96j]
heart = (z**2 + y**2 + (2 * x) ** 2 < 0.6) * (0.5 + 0.5 * y)
figures.synthetic_wall(np.stack([heart, heart / 2]), ["ED", "ES"])"""),
    new_code_cell('viewer.show_synthetic(np.stack([heart, heart / 2]), ["ED", "ES"])'),
]


def execute_chapters(folder: Path) -> None:
    """Make a miniature study: one small chapter, executed, under the names of several."""
    folder.mkdir()
    notebook = new_notebook(cells=CHAPTER, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    first, *others = [folder / f"{name}.ipynb" for name in CHAPTERS]
    nbformat.write(notebook, first)
    papermill.execute_notebook(str(first), str(first), progress_bar=False)
    for other in others:
        shutil.copy(first, other)


def script(book: Path) -> ModuleType:
    """The copy of build.py that lies in a book."""
    spec = importlib.util.spec_from_file_location("build", book / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(book: Path) -> subprocess.CompletedProcess[str]:
    """Run build.py of a copied book, beside which stand the code and the results that its pages show."""
    for shown in ("cardiac_ldm", "benchmarks"):
        if not (book.parent / shown).exists():
            (book.parent / shown).symlink_to(BOOK.parent / shown)
    command = [sys.executable, str(book / "build.py")]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the book, built: with the notebooks of the last study if there are any, else with a miniature's."""
    script(BOOK).fetch_vendored()
    copy = tmp_path_factory.mktemp("site") / "book"
    shutil.copytree(BOOK, copy, ignore=shutil.ignore_patterns("_build", "_toc.yml"))
    if not (copy / "executed" / "07_gallery.ipynb").exists():  # the last chapter of a study that was run to its end
        shutil.rmtree(copy / "executed", ignore_errors=True)
        execute_chapters(copy / "executed")
    built = build(copy)
    assert built.returncode == 0, built.stdout
    return copy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        message = "no Chromium to read the book in: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=["file", "http"])
def root(request: pytest.FixtureRequest, book: Path) -> Iterator[str]:
    """Address of the book: from disk, then from a server."""
    html = book / "_build" / "html"
    if request.param == "file":
        yield html.as_uri()
        return

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that refuses to leave this machine; any request refused or failed and any error fails the test."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    page = context.new_page()
    complaints: list[str] = []

    def answer(route):
        url = urlsplit(route.request.url)
        if url.scheme in ("file", "data", "blob") or url.hostname == "127.0.0.1":
            route.continue_()
        else:
            complaints.append(f"left this machine: {route.request.url}")
            route.abort()

    page.route("**/*", answer)

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # that one was still under way when its page was left
            complaints.append(f"failed: {request.url}: {request.failure}")

    page.on("requestfailed", failed)
    page.on("response", lambda r: complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert not complaints


def chapters(book: Path) -> list[str]:
    return sorted(path.stem for path in book.glob("executed/*.ipynb"))


def pixels(page: Page) -> bytes:
    return page.locator(".bk-volumes canvas").first.screenshot()


def settled(page: Page, before: bytes | None = None) -> bytes:
    """The volume viewer's picture once it stands still, and differs from `before`."""
    last = b""
    for _ in range(40):
        now = pixels(page)
        if now == last and now != before:
            return now
        last = now
        page.wait_for_timeout(250)
    raise AssertionError("the volume viewer's picture did not change, or does not settle")


def test_every_plot_is_drawn(book: Path, root: str, page: Page):
    drawn = 0
    for chapter in chapters(book) if root.startswith("file") else chapters(book)[:1]:
        page.goto(f"{root}/executed/{chapter}.html")
        for plot in page.locator(".bk-plot").all():
            plot.scroll_into_view_if_needed()
            plot.locator("svg.main-svg").first.wait_for(timeout=20_000)
            assert plot.bounding_box()["height"] > 100  # type: ignore[index]
            drawn += 1
    assert drawn


def test_a_volume_turns_when_dragged_and_another_one_can_be_chosen(book: Path, root: str, page: Page):
    chapter = next(c for c in chapters(book) if "bk-volumes" in (book / "executed" / f"{c}.ipynb").read_text())
    page.goto(f"{root}/executed/{chapter}.html")
    viewer = page.locator(".bk-volumes").first
    viewer.scroll_into_view_if_needed()
    viewer.locator("canvas").wait_for(timeout=20_000)
    first = settled(page)
    box = viewer.locator("canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"]  # the 3D view is on the left
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 20, steps=5)
    page.mouse.up()
    turned = settled(page, before=first)
    viewer.locator("button").nth(1).click()
    settled(page, before=turned)
    assert viewer.locator("button[aria-pressed=true]").count() == 1


def test_a_volume_lies_in_the_viewer_as_in_a_picture(page: Page, tmp_path: Path):
    script(BOOK).fetch_vendored()
    (tmp_path / "_static").mkdir()
    (tmp_path / "_static" / "vendor").symlink_to(BOOK / "assets" / "vendor")
    volume = np.zeros((1, 13, 96, 96), np.float32)
    volume[..., 10:40, 10:40] = 1  # above, and on the picture's left: the patient's right
    html, drawing = show_synthetic(volume, ["ED"]).html, (BOOK / "assets" / "figures.js").read_text()
    style = (BOOK / "assets" / "book.css").read_text()
    (tmp_path / "page.html").write_text(
        f'<html data-content_root="./"><style>{style}</style><div style="width: 900px">{html}</div>'
        f"<script>{drawing}</script></html>"
    )
    page.goto((tmp_path / "page.html").as_uri())
    page.locator(".bk-volumes canvas").wait_for(timeout=20_000)
    width, height, rows, _ = png.Reader(bytes=settled(page)).asRGB8()
    grey = np.vstack(list(rows)).reshape(height, width, 3).mean(axis=2)
    x, y, dx, dy = (round(part) for part in (0.66 * width, 0.68 * height, 0.1 * width, 0.2 * height))  # axial slices
    above, below = grey[y - dy : y], grey[y : y + dy]
    others = [above[:, x : x + dx], below[:, x - dx : x], below[:, x : x + dx]]
    assert above[:, x - dx : x].mean() > 10 * max(other.mean() for other in others)


def test_equations_are_set(root: str, page: Page):
    page.goto(f"{root}/method.html")
    page.locator("mjx-container").nth(1).wait_for(timeout=20_000)
    page.evaluate("document.fonts.ready")
    assert page.locator("mjx-merror").count() == 0


def test_runs_of_one_stage_are_told_apart_by_title(book: Path):
    page = (book / "_build" / "html" / "intro.html").read_text()
    for chapter in chapters(book):
        epsilon = chapter.partition("-eps")[2]
        if epsilon:
            assert {"0": ", public data only", "inf": ", no privacy"}.get(epsilon, f", ε = {epsilon}") in page


def test_nothing_that_was_printed_as_progress_is_published(book: Path):
    for chapter in chapters(book):
        assert "output stderr" not in (book / "_build" / "html" / "executed" / f"{chapter}.html").read_text()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda page: page.unlink(), "made no such page"),
        (
            lambda page: page.write_text(page.read_text().replace('<div class="bk-plot', "<div")),
            "outputs .* are missing",
        ),
    ],
)
def test_pages_and_figures_that_the_build_lost_are_noticed(book: Path, tmp_path: Path, damage, complaint: str):
    copy = tmp_path / "book"
    shutil.copytree(book, copy)
    script(copy).check_pages()
    damage(copy / "_build" / "html" / "executed" / "06_tradeoff.html")
    with pytest.raises(StudyError, match=complaint):
        script(copy).check_pages()


def test_tables_hold_what_benchmarks_measured(book: Path):
    measured = json.loads((BOOK.parent / "benchmarks" / "results" / "dp_step.json").read_text())
    page = (book / "_build" / "html" / "mechanism.html").read_text()
    for row in measured["rows"]:
        assert f"{row['time']:.2f} [{row['time_low']:.2f}, {row['time_high']:.2f}]" in page
    assert "benchmarks.dp_step" in page


def test_published_notebooks_do_not_tell_how_long_a_cell_took_nor_what_went_to_stderr(tmp_path: Path):
    cell = new_code_cell(
        "1", metadata={"papermill": {"duration": 3.5, "status": "completed"}, "execution": {"iopub.status.busy": "now"}}
    )
    cell.outputs = [new_output("stream", name=name, text=name) for name in ("stderr", "stdout")]
    times = {"duration": 4.5, "start_time": "now", "end_time": "then", "parameters": {"epsilon": 1}}
    executed = new_notebook(cells=[cell], metadata={"papermill": times})
    nbformat.write(executed, tmp_path / "executed.ipynb")
    subprocess.run(
        [sys.executable, BOOK / "publish.py", tmp_path / "executed.ipynb", tmp_path / "published.ipynb"], check=True
    )
    published = nbformat.read(tmp_path / "published.ipynb", 4)
    assert published.metadata.papermill == {"parameters": {"epsilon": 1}}
    assert published.cells[0].metadata == {"papermill": {"status": "completed"}}
    assert [output.text for output in published.cells[0].outputs] == ["stdout"]
    assert not [p for p in (BOOK / "executed").glob("*.ipynb") if '"stderr"' in p.read_text()]
    assert not [p for p in (BOOK / "executed").glob("*.ipynb") if '"duration"' in p.read_text()]


def test_a_chapter_that_ended_in_an_error_is_not_published(book: Path, tmp_path: Path):
    copy = tmp_path / "book"
    shutil.copytree(book, copy)
    path = copy / "executed" / "06_tradeoff.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
    nbformat.write(notebook, path)
    with pytest.raises(StudyError, match="ended in an error"):
        script(copy).check_pages()


def test_a_broken_link_fails_the_build(book: Path, tmp_path: Path):
    copy = tmp_path / "book"
    shutil.copytree(book, copy)
    with (copy / "data.md").open("a") as chapter:
        chapter.write("\n[nowhere](executed/nowhere.ipynb)\n")
    built = build(copy)
    assert built.returncode != 0
    assert "nowhere" in built.stdout


def test_a_book_without_notebooks_says_to_run_the_study(tmp_path: Path):
    copy = tmp_path / "book"
    shutil.copytree(BOOK, copy, ignore=shutil.ignore_patterns("_build", "executed"))
    built = build(copy)
    assert built.returncode != 0
    assert "run the study first" in built.stdout
