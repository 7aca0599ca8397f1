"""The book, built as a reader gets it and driven in a browser that reaches nothing but the book's own files."""

import functools
import hashlib
import importlib
import json
import os
import re
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
import pandas as pd
import papermill
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from _plotly_utils import png  # type: ignore[import-untyped]
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import Browser, Page, sync_playwright
from sphinx.errors import ExtensionError

from cardiac_ldm.errors import StudyError
from cardiac_ldm.report.viewer import show_levels, show_synthetic

pytestmark = pytest.mark.slow(minutes=4)

BOOK = Path(__file__).parents[1] / "book"
CHROMIUM = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
]
AXE = (
    "axe-core@4.14.1",
    "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
    {"package/axe.min.js": "axe.min.js"},
)
"""What finds faults that keep a page from people with a disability, pinned as the book's libraries are."""
NOTEBOOKS = sorted(path.stem for path in (BOOK.parent / "notebooks").glob("0[0-7]_*.ipynb"))  # of a study
CHAPTER = [
    new_markdown_cell("# A chapter\n\n$$ g = \\frac{1}{B} \\sum_i g_i $$"),
    new_code_cell('profile = "demo"', metadata={"tags": ["parameters"]}),
    new_code_cell("""
import numpy as np, sys
import plotly.graph_objects as go
from cardiac_ldm.report import viewer, walls
print("progress", file=sys.stderr)
go.Figure(go.Scatter(y=[1, 3, 2]))"""),
    new_code_cell("""
z, y, x = np.mgrid[-1:1:13j, -1:1:96j, -1:1:96j]
heart = (z**2 + y**2 + (2 * x) ** 2 < 0.6) * (0.5 + 0.5 * y)
walls.synthetic_wall(np.stack([heart, heart / 2]), ["ED", "ES"])"""),
    new_code_cell('viewer.show_synthetic(np.stack([heart, heart / 2]), ["ED", "ES"])'),
]


def module(name: str) -> ModuleType:
    """One of the book's scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BOOK)
        patch.syspath_prepend(BOOK / "_ext")
        return importlib.import_module(name)


def run(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does whose machine reaches no other; whoever tries to is listed in `refused`."""
    fence = folder / "fence"
    fence.mkdir(exist_ok=True)
    (fence / "sitecustomize.py").write_text(f"""
import socket
def refuse(self, address):
    with open({str(folder / "refused")!r}, "a") as refused:
        print(address, file=refused)
    raise OSError("no network")
socket.socket.connect = refuse
""")
    found = {name: os.environ.get(name, "") for name in ("PATH", "PYTHONPATH")}
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), found["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(fence), *filter(None, [found["PYTHONPATH"]])]),
        "npm_config_registry": "http://127.0.0.1:9/",
        "npm_config_cache": str(folder / "npm"),
        "NO_COLOR": "1",
    }
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run([*map(str, command)], cwd=folder, env=environment, text=True, timeout=600, **streams)  # type: ignore[call-overload]


def clone(folder: Path) -> Path:
    """Copy the book as set-up leaves it, and put beside it the code and the results that its pages show."""
    shutil.copytree(BOOK, folder / "book", ignore=shutil.ignore_patterns("_build", "__pycache__"))
    for shown in ("cardiac_ldm", "benchmarks", "notebooks", "CITATION.cff"):
        (folder / shown).symlink_to(BOOK.parent / shown)
    return folder / "book"


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "_build" not in path.parts}


@pytest.fixture(scope="module")
def chapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small notebook, executed."""
    path = tmp_path_factory.mktemp("executed") / "chapter.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=CHAPTER, metadata={"kernelspec": kernel}), path)
    papermill.execute_notebook(str(path), str(path), {"profile": "/elsewhere/mine.yaml"}, progress_bar=False)
    return path


@pytest.fixture
def small(tmp_path: Path, chapter: Path) -> Path:
    """A book of two pages, in the published one's settings."""
    book = clone(tmp_path)
    for page in (*book.glob("*.md"), *book.glob("executed/*.ipynb")):
        page.unlink()
    (book / "intro.md").write_text("# A page\n\n$$ e^x $$\n")
    (book / "_toc.yml").write_text("{format: jb-book, root: intro, chapters: [{file: executed/06_tradeoff}]}")
    shutil.copy(chapter, book / "executed" / "06_tradeoff.ipynb")
    return book


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published book, built by the reader's command from what a clone and its set-up bring, with no network."""
    module("vendored").fetch()
    copy = clone(tmp_path_factory.mktemp("site"))
    before = files(copy)
    built = run(copy.parent, "jupyter-book", "build", "book")
    assert built.returncode == 0, built.stdout
    assert "WARNING" not in built.stdout
    assert not (copy.parent / "refused").exists(), (copy.parent / "refused").read_text()
    assert {k: v for k, v in files(copy).items() if "__pycache__" not in k.parts} == before
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

    def said(message):
        if message.type == "error" or "WebGL contexts" in message.text:
            complaints.append(message.text)

    page.on("console", said)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert not complaints


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script, fetched from npm."""
    vendored, folder = module("vendored"), tmp_path_factory.mktemp("vendor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vendored, "VENDOR", folder)
        patch.setattr(vendored, "PACKAGES", {"axe": AXE})
        vendored.fetch()
    return (folder / "axe" / "axe.min.js").read_text()


FIGURES = ".bk-plot, .bk-volumes, .bk-dial, .bk-levels, .bk-mechanism"


def draw_all(page: Page) -> None:
    """Have all figures of a page drawn, as they are before it's printed."""
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function(
        f"[...document.querySelectorAll('{FIGURES}')].every((box) => box.dataset.drawn)", timeout=60_000
    )


def set_theme(page: Page, theme: str) -> None:
    page.add_init_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")


def chapters(book: Path) -> list[str]:
    return sorted(path.stem for path in book.glob("executed/*.ipynb"))


def pixels(page: Page) -> bytes:
    return page.locator(".bk-volumes .bk-stage canvas").first.screenshot()


def settled(page: Page, before: bytes | None = None) -> bytes:
    """The 3D view's picture once it stands still, and differs from `before`."""
    last = b""
    for _ in range(40):
        now = pixels(page)
        if now == last and now != before:
            return now
        last = now
        page.wait_for_timeout(250)
    raise AssertionError("the 3D view's picture did not change, or does not settle")


def panels(page: Page, box: str = ".bk-volumes") -> list[str]:
    """The pictures of a viewer's visible panels, each pixel."""
    return page.locator(box).first.evaluate(
        "box => [...box.querySelectorAll('figure:not([hidden]) canvas')].map(canvas => canvas.toDataURL())"
    )


def changed(before: list[str], after: list[str]) -> list[bool]:
    return [old != new for old, new in zip(before, after, strict=True)]


CLOUD = re.compile("cloud|chart studio|share|upload|plotly", re.IGNORECASE)


def offers(page: Page) -> list[str]:
    """What the buttons of a page's plots say they do."""
    return page.locator(".modebar-btn").evaluate_all(
        "buttons => buttons.map(b => [b.dataset.title, b.getAttribute('aria-label'), b.href].join(' '))"
    )


def test_every_plot_is_drawn_and_none_offers_to_upload_it(book: Path, root: str, page: Page):
    drawn = 0
    for chapter in chapters(book) if root.startswith("file") else chapters(book)[:1]:
        page.goto(f"{root}/executed/{chapter}.html")
        assert page.locator(".bk-plot, .bk-wall, .bk-volumes, table").count()
        for plot in page.locator(".bk-plot").all():
            plot.scroll_into_view_if_needed()
            plot.locator("svg.main-svg").first.wait_for(timeout=20_000)
            plot.locator(".modebar-btn").first.wait_for(state="attached", timeout=20_000)
            assert plot.bounding_box()["height"] > 100  # type: ignore[index]
            drawn += 1
        assert not [offer for offer in offers(page) if CLOUD.search(offer)]
    assert drawn


def test_panels_of_a_viewer_move_together_and_answer_keys(book: Path, root: str, page: Page):
    page.goto(f"{root}/executed/07_gallery.html")
    viewer = page.locator(".bk-volumes").first
    viewer.scroll_into_view_if_needed()
    viewer.locator("figure canvas").first.wait_for(timeout=20_000)
    before = panels(page)
    assert len(before) == len(list(book.glob("executed/03_*"))) + 1
    assert "slice 7" in (viewer.locator("figure canvas").first.get_attribute("aria-label") or "")
    viewer.locator(".bk-panels").focus()
    page.keyboard.press("ArrowDown")
    lower = panels(page)
    assert all(changed(before, lower))
    assert "8 of 13" in viewer.locator(".bk-slice").inner_text()
    page.keyboard.press("ArrowUp")
    assert not any(changed(before, panels(page)))
    page.keyboard.press("d")
    assert changed(before, panels(page)) == [False] + [True] * (len(before) - 1)
    assert "less public data only" in viewer.locator("figcaption:visible").nth(1).inner_text()
    assert "synthetic" in viewer.locator(".bk-badge").inner_text()


def test_a_viewer_flips_the_phase_and_hides_labels(page: Page, tmp_path: Path):
    volumes = np.random.default_rng(0).random((4, 13, 96, 96), dtype=np.float32)
    labels = np.zeros((4, 13, 96, 96), np.uint8)
    labels[:, :, 40:60, 40:60] = 3
    html = show_synthetic(volumes, ["one", "one", "two", "two"], ["ED", "ES"] * 2, labels).html
    page.goto(bare(tmp_path, html))
    page.locator("figure canvas").first.wait_for(timeout=20_000)
    labelled = panels(page)
    assert len(labelled) == 2
    page.locator(".bk-panels").focus()
    page.keyboard.press("o")
    alone = panels(page)
    assert all(changed(labelled, alone))
    page.keyboard.press("f")
    assert all(changed(alone, panels(page)))


def test_slices_are_there_without_webgl(page: Page, tmp_path: Path):
    html = show_synthetic(np.ones((2, 13, 96, 96), np.float32), ["ED", "ES"]).html
    page.add_init_script(
        "HTMLCanvasElement.prototype.getContext = ((get) => function (kind, ...rest) {"
        " return kind.startsWith('webgl') ? null : get.call(this, kind, ...rest); })"
        "(HTMLCanvasElement.prototype.getContext);"
    )
    page.goto(bare(tmp_path, html))
    page.locator("figure canvas").first.wait_for(timeout=20_000)
    assert len(panels(page)) == 2


def test_a_volume_turns_when_dragged_and_another_one_can_be_chosen(root: str, page: Page):
    page.goto(f"{root}/executed/07_gallery.html")
    viewer = page.locator(".bk-volumes").first
    viewer.scroll_into_view_if_needed()
    viewer.get_by_text("turn in 3D").click(timeout=20_000)
    viewer.locator(".bk-stage canvas").wait_for(timeout=20_000)
    first = settled(page)
    box = viewer.locator(".bk-stage canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"]  # the 3D view is on the left
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 20, steps=5)
    page.mouse.up()
    turned = settled(page, before=first)
    viewer.locator(".bk-titles button").nth(3).click()
    settled(page, before=turned)
    assert viewer.locator(".bk-titles button[aria-pressed=true]").count() == 1


def bare(folder: Path, html: str) -> str:
    """Address of a page of nothing but these elements and the book's script."""
    module("vendored").fetch()
    (folder / "_static").mkdir()
    (folder / "_static" / "vendor").symlink_to(BOOK / "assets" / "vendor")
    drawing, style = ((BOOK / "assets" / name).read_text() for name in ("figures.js", "book.css"))
    (folder / "page.html").write_text(
        f'<html data-content_root="./"><meta charset="utf-8"><style>{style}</style>'
        f'<div style="width: 900px">{html}</div>'
        f"<script>{drawing}</script></html>"
    )
    return (folder / "page.html").as_uri()


def test_a_volume_lies_in_the_viewer_as_in_a_picture(page: Page, tmp_path: Path):
    volume = np.zeros((1, 13, 96, 96), np.float32)
    volume[..., 10:40, 10:40] = 1  # above, and on the picture's left: the patient's right
    page.goto(bare(tmp_path, show_synthetic(volume, ["ED"]).html))
    slices = page.locator("figure canvas").first
    slices.wait_for(timeout=20_000)
    bright = "(canvas, [x, y]) => canvas.getContext('2d').getImageData(x * 4, y * 4, 1, 1).data[0]"
    found = [slices.evaluate(bright, place) for place in ([25, 25], [70, 25], [25, 70], [70, 70])]
    assert found[0] > 250
    assert max(found[1:]) < 5
    page.get_by_text("turn in 3D").click()
    page.locator(".bk-stage canvas").wait_for(timeout=20_000)
    width, height, rows, _ = png.Reader(bytes=settled(page)).asRGB8()
    grey = np.vstack(list(rows)).reshape(height, width, 3).mean(axis=2)
    x, y, dx, dy = (round(part) for part in (0.66 * width, 0.68 * height, 0.1 * width, 0.2 * height))  # axial slices
    above, below = grey[y - dy : y], grey[y : y + dy]
    others = [above[:, x : x + dx], below[:, x - dx : x], below[:, x : x + dx]]
    assert above[:, x - dx : x].mean() > 10 * max(other.mean() for other in others)


def test_the_epsilon_dial_moves_volumes_words_and_numbers_together(root: str, page: Page):
    page.goto(f"{root}/intro.html")
    dial = page.locator(".bk-dial")
    dial.scroll_into_view_if_needed()
    dial.locator("figure canvas").first.wait_for(timeout=20_000)
    seen = set()
    for stop in dial.locator(".bk-stops button").all():
        stop.click()
        picture = tuple(panels(page, ".bk-dial"))
        seen.add((picture[0], dial.locator(".bk-words").inner_text(), dial.locator("tbody").inner_text()))
    assert [len({one[k] for one in seen}) for k in range(3)] == [len(seen)] * 3
    assert len(seen) >= 3
    dial.locator("input").first.focus()
    page.keyboard.press("Home")
    assert dial.locator(".bk-told").inner_text() == "public data only"


def levels_dial() -> str:
    """A dial of two attributes at three levels, whose pictures are noise."""
    names = ["LVEDV", "LVEF"]
    table = pd.DataFrame({"attribute": np.repeat(names, 3), "phase": np.repeat(["ED", "ES"], 3)})
    table = table.assign(requested=[100.0, 150, 200, 40, 50, 60], measured=[110.0, 155, 190, 41, 52, 63])
    return show_levels(np.random.default_rng(0).random((6, 13, 96, 96), dtype=np.float32), table, "ε = 1").html


def test_the_attribute_dial_moves_picture_words_and_numbers_together(page: Page, tmp_path: Path):
    page.goto(bare(tmp_path, levels_dial()))
    dial = page.locator(".bk-levels")
    dial.locator("figure canvas").first.wait_for(timeout=20_000)
    attributes, seen = dial.locator(".bk-stops").first.locator("button").all(), set()
    for choice in attributes:
        choice.click()
        for stop in dial.locator(".bk-stops").nth(1).locator("button").all():
            stop.click()
            seen.add((panels(page, ".bk-levels")[0], dial.locator(".bk-words").inner_text()))
    assert [len({one[k] for one in seen}) for k in range(2)] == [6, 6]
    dial.locator("input").focus()
    page.keyboard.press("Home")
    assert "requested 40 %, measured 41 %" in dial.locator(".bk-words").inner_text()
    assert dial.locator("th.bk-chosen").inner_text() == "40 %"
    assert "synthetic, ε = 1: ES, requested 40 %" in (dial.locator("canvas").first.get_attribute("aria-label") or "")
    assert dial.locator("img").count() == 0


def blank(picture: bytes) -> bool:
    """Whether a PNG is of one colour, but for a border."""
    width, height, rows, _ = png.Reader(bytes=picture).asRGB8()
    inside = np.vstack(list(rows)).reshape(height, width, 3)[4:-4, 4:-4]
    return bool((np.ptp(inside, axis=(0, 1)) < 20).all())


def test_nothing_prints_blank(book: Path, page: Page):
    html = book / "_build" / "html"
    page.emulate_media(media="print")
    for name in ("intro", "mechanism", "executed/04_evaluate", "executed/07_gallery"):
        page.goto((html / f"{name}.html").as_uri())
        draw_all(page)
        pictures = page.locator(f"{FIGURES}, .bk-wall img").all()
        assert pictures
        for picture in pictures:
            assert picture.bounding_box()["height"] > 100  # type: ignore[index]
            assert not blank(picture.screenshot()), name
        assert not [shown for shown in page.locator(".bk-controls, .bk-stops").all() if shown.is_visible()]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_has_a_serious_fault_for_people_with_a_disability(book: Path, page: Page, axe: str, theme: str):
    set_theme(page, theme)
    html, faults = book / "_build" / "html", set()
    (html / "dial.html").write_text((html / "cite.html").read_text().replace("</h1>", f"</h1>{levels_dial()}", 1))
    for path in sorted({*html.glob("*.html"), *html.glob("executed/*.html")} - {html / "index.html"}):  # it leads on
        page.goto(path.as_uri())
        draw_all(page)
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")["violations"]
        serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
        faults |= {(fault["id"], path.stem, node["html"][:150]) for fault in serious for node in fault["nodes"]}
    (html / "dial.html").unlink()
    assert not faults


def test_the_mechanism_moves_with_its_sliders(root: str, page: Page):
    page.goto(f"{root}/mechanism.html")
    motion = page.locator(".bk-mechanism")
    motion.locator("svg").wait_for(timeout=20_000)
    said = [motion.locator(".bk-words").inner_text()]
    for slider in motion.locator("input").all():
        slider.focus()
        page.keyboard.press("ArrowRight")
        said.append(motion.locator(".bk-words").inner_text())
    assert len(set(said)) == 4
    assert "C/N = 0.092" in said[1]  # C = 1.1, N = 12


@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (390, "dark"), (1280, "dark")])
def test_no_page_is_wider_than_the_screen_and_dark_pages_have_dark_figures(
    book: Path, page: Page, width: int, theme: str
):
    page.set_viewport_size({"width": width, "height": 900})
    set_theme(page, theme)
    html = book / "_build" / "html"
    for path in [html / "intro.html", html / "results.html", *html.glob("executed/0[4-7]*.html")]:
        page.goto(path.as_uri())
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
    page.goto((html / "intro.html").as_uri())
    page.locator(".bk-plot svg.main-svg").first.wait_for(timeout=20_000)
    paper = page.locator(".bk-plot svg.main-svg").first.evaluate("svg => svg.style.background")
    assert ("255" in paper or "white" in paper) == (theme == "light")


def test_the_panels_of_the_first_figure_lie_below_each_other_on_a_narrow_screen(book: Path, page: Page):
    title = ".bk-plot .annotation-text"
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto((book / "_build" / "html" / "intro.html").as_uri())
        page.locator(title).nth(1).wait_for(timeout=20_000)
        first, second = (page.locator(title).nth(i).bounding_box() for i in range(2))
        legend = page.locator(".bk-plot .legend").bounding_box()
        assert first is not None and second is not None and legend is not None  # noqa: PT018
        assert legend["y"] + legend["height"] <= first["y"] + 1
        beside = second["x"] > first["x"] + first["width"]
        assert (beside, second["y"] > first["y"] + 200) == (width > 600, width <= 600)


def test_every_picture_is_described_captioned_and_says_whom_it_shows(book: Path):
    for path in (book / "_build" / "html").rglob("*.html"):
        text = path.read_text()
        for figure in re.findall(r'<div class="bk-(?:plot|volumes|wall|dial|levels|mechanism)"[^>]*>', text):
            assert re.search(r'aria-label="[^"]{10,}"', figure), f"{path.name}: {figure[:200]}"
        assert not [image for image in re.findall(r"<img [^>]*>", text) if 'alt="' not in image], path.name
        for wall in re.findall(r'<div class="bk-wall".*?</div>', text, re.DOTALL):
            assert re.search(r'bk-badge">[^<]*(simulated|synthetic)', wall), path.name


def test_pages_show_numbers_and_no_roles_and_not_which_stages_ran(book: Path):
    for path in (book / "_build" / "html").rglob("*.html"):
        assert not re.search(r"\{(value|claim)\}|not done yet with these settings; running", path.read_text()), (
            path.name
        )


def test_pages_are_light(book: Path):
    for path in (book / "_build" / "html").rglob("*.html"):
        text = path.read_text()
        pictures = sum(map(len, re.findall(r'"(?:nifti|labels)": "[^"]*"|src="data:image[^"]*"', text)))
        assert len(text) < 3e6, path.name
        assert len(text) - pictures < 4e5, path.name


def test_what_pages_offer_to_download_is_there(book: Path):
    html, offered = book / "_build" / "html", 0
    for path in html.glob("executed/*.html"):
        for link in re.findall(r'<a download="[^"]*" href="([^"]*)"', path.read_text()):
            assert json.loads((path.parent / link).read_text()), link
            offered += 1
    assert offered > 20
    notebooks = re.findall(r'download="" href="([^"]*ipynb)"', (html / "results.html").read_text())
    assert len(notebooks) == 4
    assert all((html / link).exists() for link in notebooks)


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
    html = tmp_path / "html"
    shutil.copytree(book / "_build" / "html", html)
    check = module("local_figures").check_pages
    check(book, html)
    damage(html / "executed" / "06_tradeoff.html")
    with pytest.raises(ExtensionError, match=complaint):
        check(book, html)


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


def test_a_chapter_that_ended_in_an_error_fails_the_build(small: Path):
    path = small / "executed" / "06_tradeoff.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
    nbformat.write(notebook, path)
    built = run(small.parent, "jupyter-book", "build", "book")
    assert built.returncode != 0
    assert "06_tradeoff.ipynb: its execution ended in an error" in built.stdout


def test_a_chapter_that_the_contents_leave_out_fails_the_build(small: Path):
    shutil.copy(small / "executed" / "06_tradeoff.ipynb", small / "executed" / "07_gallery.ipynb")
    built = run(small.parent, "jupyter-book", "build", "book")
    assert built.returncode != 0
    assert "does _toc.yml name 07_gallery.ipynb?" in built.stdout


def test_contents_are_those_of_the_chapters_that_are_published():
    assert (BOOK / "_toc.yml").read_text() == module("build").contents(BOOK / "executed")


def test_a_broken_link_fails_the_build(small: Path):
    with (small / "intro.md").open("a") as page:
        page.write("\n[nowhere](executed/nowhere.ipynb)\n")
    built = run(small.parent, "jupyter-book", "build", "book", "-W", "-n", "--keep-going")
    assert built.returncode != 0
    assert "nowhere" in built.stdout


def test_without_viewers_the_book_says_so_and_takes_them_up_once_they_are_there(small: Path, page: Page):
    vendor = small / "assets" / "vendor"
    shutil.rmtree(vendor)
    html = small / "_build" / "html"
    built = run(small.parent, "jupyter-book", "build", "book", "-W", "-n", "--keep-going")
    assert built.returncode == 0, built.stdout
    assert "npm could not fetch it" in built.stdout
    assert not list(vendor.iterdir())
    lacking = page.locator(".bk-lacking")
    context = page.context.browser.new_context()  # type: ignore[union-attr]
    try:  # where files that aren't there may be asked for
        without = context.new_page()
        without.goto((html / "intro.html").as_uri())
        without.get_by_text("equations on this page are shown as TeX").wait_for(timeout=20_000)
        without.goto((html / "executed" / "06_tradeoff.html").as_uri())
        volumes = without.locator(".bk-volumes")
        volumes.scroll_into_view_if_needed()
        volumes.locator("canvas").first.wait_for(timeout=20_000)  # slices need no viewer
        volumes.get_by_text("turn in 3D").click()
        volumes.get_by_text("This volume can't be turned").wait_for(timeout=20_000)
        without.locator(".bk-plot svg.main-svg").first.wait_for()
    finally:
        context.close()

    shutil.copytree(BOOK / "assets" / "vendor", vendor, dirs_exist_ok=True)
    built = run(small.parent, "jupyter-book", "build", "book")
    assert built.returncode == 0, built.stdout
    page.goto((html / "executed" / "06_tradeoff.html").as_uri())
    page.locator(".bk-volumes").scroll_into_view_if_needed()
    page.locator(".bk-volumes").get_by_text("turn in 3D").click()
    page.locator(".bk-volumes .bk-stage canvas").wait_for(timeout=20_000)
    page.goto((html / "intro.html").as_uri())
    page.locator("mjx-container").first.wait_for(timeout=20_000)
    assert lacking.count() == 0


def test_another_archive_than_the_one_pinned_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vendored = module("vendored")
    package = tmp_path / "package"
    package.mkdir()
    (package / "package.json").write_text('{"name": "small", "version": "1.0.0", "files": ["dist"]}')
    (package / "dist").mkdir()
    (package / "dist" / "small.js").write_text("1")
    monkeypatch.setattr(vendored, "VENDOR", tmp_path / "vendor")
    members = {"package/dist/": "lib/"}
    monkeypatch.setattr(vendored, "PACKAGES", {"small": (str(package), "0" * 64, members)})
    with pytest.raises(StudyError, match="not the one pinned"):
        vendored.fetch()
    assert not list(vendored.VENDOR.iterdir())
    pinned = hashlib.sha256(vendored._pack(str(package), tmp_path).read_bytes()).hexdigest()
    monkeypatch.setattr(vendored, "PACKAGES", {"small": (str(package), pinned, members)})
    vendored.fetch()
    shutil.rmtree(package)
    vendored.fetch()  # which fetches nothing again
    fetched = {path.relative_to(vendored.VENDOR) for path in vendored.VENDOR.rglob("*") if path.is_file()}
    assert fetched == {Path("small/SOURCE"), Path("small/lib/small.js")}


def execute(folder: Path, chapter: Path) -> None:
    """Put a small notebook where a study's chapters go, for budgets that the published one hasn't."""
    folder.mkdir()
    for name in NOTEBOOKS:
        for run in ["-eps0.5", "-eps2", "-epsinf"] if name.startswith("03") else [""]:
            shutil.copy(chapter, folder / f"{name}{run}.ipynb")


def test_a_run_of_ones_own_has_a_book_of_its_own(tmp_path: Path, chapter: Path, page: Page):
    book = clone(tmp_path)
    execute(tmp_path / "run", chapter)
    before = files(book)
    module("build").assemble(tmp_path / "run", tmp_path / "runs" / "book")  # an earlier run's, of other budgets
    (tmp_path / "run" / "03_dp_finetune-eps2.ipynb").unlink()
    built = run(tmp_path, sys.executable, "book/build.py", "run", "runs/book")
    assert built.returncode == 0, built.stdout
    assert "WARNING" not in built.stdout
    assert {k: v for k, v in files(book).items() if "__pycache__" not in k.parts} == before
    html = tmp_path / "runs" / "book" / "_build" / "html"
    page.goto((html / "intro.html").as_uri())
    assert "your own run, with the profile mine" in page.locator(".admonition.note").first.inner_text()
    assert "your own run" in page.title()
    contents = page.locator(".bd-sidebar").inner_text()
    assert "ε = 0.5" in contents
    assert "ε = 2" not in contents
    assert "sample_batch" in (html / "mechanism.html").read_text()
    page.goto((html / "executed" / "03_dp_finetune-eps0.5.html").as_uri())
    page.locator(".bk-plot svg.main-svg").first.wait_for(timeout=20_000)


def test_the_published_book_does_not_speak_of_ones_own_run(book: Path):
    assert "own run" not in (book / "_build" / "html" / "intro.html").read_text()


def test_a_book_goes_neither_over_another_folder_nor_over_what_it_is_made_of(tmp_path: Path, chapter: Path):
    build = module("build")
    execute(tmp_path / "run", chapter)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    before = files(tmp_path)
    for into in (tmp_path / "mine", tmp_path, tmp_path / "run", tmp_path / "run" / "book", BOOK, BOOK / "executed"):
        with pytest.raises(StudyError, match="name a"):
            build.assemble(tmp_path / "run", into)
    assert files(tmp_path) == before


def test_a_study_that_was_not_run_to_its_end_has_no_book_yet(tmp_path: Path, chapter: Path):
    execute(tmp_path / "run", chapter)
    (tmp_path / "run" / "05_privacy_audit.ipynb").unlink()
    built = run(tmp_path, sys.executable, BOOK / "build.py", "run", "book")
    assert built.returncode != 0
    assert "no 05_privacy_audit.ipynb: run the study to its end" in built.stdout
    assert not (tmp_path / "book").exists()


def test_a_page_holds_more_volumes_than_a_browser_can_draw_at_once(book: Path, page: Page):
    z, y, x = np.mgrid[-1:1:13j, -1:1:96j, -1:1:96j]
    heart = (z**2 + y**2 + (2 * x) ** 2 < 0.6) * (0.5 + 0.5 * y)
    volumes = show_synthetic(np.stack([heart, heart / 2]).astype(np.float32), ["ED", "ES"])._repr_html_()
    head = '<link rel="stylesheet" href="_static/book.css"><script defer src="_static/figures.js"></script>'
    many = book / "_build" / "html" / "many.html"
    many.write_text(f'<html data-content_root=""><meta charset="utf-8">{head}<body>{volumes * 20}</body></html>')
    page.set_viewport_size({"width": 500, "height": 500})
    page.goto(many.as_uri())
    boxes = page.locator(".bk-volumes").all()
    for box in boxes:
        box.scroll_into_view_if_needed()
        box.get_by_text("turn in 3D").click(timeout=20_000)
        box.locator(".bk-stage canvas").wait_for(timeout=20_000)
        assert page.locator(".bk-stage").count() < 10
    page.wait_for_timeout(300)
    assert boxes[0].locator(".bk-stage").count() == 0
    assert boxes[0].locator("figure canvas").count() == 2
    many.unlink()


def test_no_plot_of_a_live_notebook_offers_to_upload_it(page: Page):
    live = pio.renderers["book"].to_mimebundle(go.Figure(go.Scatter(y=[1, 3, 2])).to_dict())
    page.add_script_tag(path=module("local_figures").PLOTLY)
    page.evaluate(
        "f => Plotly.newPlot(document.body, f.data, f.layout, f.config)", live["application/vnd.plotly.v1+json"]
    )
    assert "Download" in " ".join(offers(page))
    assert not [offer for offer in offers(page) if CLOUD.search(offer)]
