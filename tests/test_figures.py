import base64
import inspect
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from _plotly_utils import png  # type: ignore[import-untyped]

from benchmarks.headline import save_headline
from cardiac_ldm.cohort import ATTRIBUTES, Patients
from cardiac_ldm.errors import ParameterError, PrivacyError, StudyError
from cardiac_ldm.report import figures, walls


class FewPatients(Patients):
    """Two volumes and their attributes, which need no store."""

    attributes = np.arange(28, dtype=np.float32).reshape(2, 14)

    def __init__(self, role: str, simulated: bool) -> None:
        secret = role == "private" and not simulated
        self._manifest = SimpleNamespace(name="few", role=role, simulated=simulated, secret=secret)  # type: ignore[assignment]

    def images(self, volumes):
        return np.random.default_rng(0).random((2, 13, 96, 96), dtype=np.float32)[list(volumes)]

    def labels(self, volumes):
        labels = np.zeros((2, 13, 96, 96), np.uint8)
        labels[0, 4, 10:20, 30:40] = 3
        return labels[list(volumes)]


def rows(metric, points):
    columns = ["epsilon", "value", "low", "high"]
    return pd.DataFrame(points, columns=columns).assign(
        metric=metric, n_patients=40, run="run", model="held-out patients"
    )


METRICS = pd.concat(
    [
        rows("kid", [(0, 6, 5, 7), (1, 5, 4, 6.5), (10, 4, 3, 5), (math.inf, 3, 2, 4), (math.nan, 1, 0.5, 1.5)]),
        rows("phase_accuracy", [(0, 0.7, 0.6, 0.8), (1, 0.8, 0.7, 0.9), (10, 0.9, 0.8, 0.95)]),
    ]
)


def test_a_figure_shows_both_in_the_book_and_in_a_live_notebook():
    bundle = pio.renderers["book"].to_mimebundle(go.Figure(go.Scatter(y=[1, 2], name="</script>")).to_dict())
    assert bundle["application/vnd.plotly.v1+json"]["data"][0]["name"] == "</script>"
    html = bundle["text/html"]
    assert html.startswith('<div class="bk-plot"')
    payload = html.split('<script type="application/json">')[1].split("</script>")[0]
    assert json.loads(payload)["data"][0]["name"] == "</script>"
    assert pio.renderers.default == "book"


def test_whole_stacks_lie_in_rows_from_base_to_apex_with_their_labels_outlined():
    figure = walls.stack_wall(FewPatients("public", False), [0, 1], ["first", "second"])
    picture = read_picture(figure.data[0].source)
    assert picture.shape == (2 * 96, 13 * 96, 3)
    red = (picture == [0xD5, 0x5E, 0x00]).all(axis=2)
    expected = np.zeros((2 * 96, 13 * 96), bool)
    expected[10:20, 4 * 96 + 30 : 4 * 96 + 40] = True
    expected[11:19, 4 * 96 + 31 : 4 * 96 + 39] = False
    assert np.array_equal(red, expected)
    assert list(figure.data[1].text) == ["first", "second"]
    with pytest.raises(ParameterError, match="one caption per volume"):
        walls.stack_wall(FewPatients("public", False), [0, 1], ["first"])
    with pytest.raises(PrivacyError):
        walls.stack_wall(FewPatients("private", False), [0], ["first"])


def read_picture(uri):
    _, _, rows, _ = png.Reader(bytes=base64.b64decode(uri.partition(",")[2])).asRGB8()
    return np.vstack([np.asarray(row, np.uint8) for row in rows]).reshape(2 * 96, -1, 3)


def test_a_mosaic_shows_the_middle_of_the_slices_that_are_not_padding_tile_by_tile():
    volumes = np.zeros((3, 13, 4, 4), np.float32)
    for i, level in enumerate((0.2, 0.4, 0.6)):
        volumes[i, 4:9] = 0.1
        volumes[i, 6] = level
    grey = walls.mosaic(volumes, columns=2)
    assert grey.shape == (12, 12)
    assert [grey[0, 0], grey[0, 6], grey[6, 0]] == [51, 102, 153]
    assert grey[6, 6] == 255  # no fourth volume
    assert (grey[4:6] == 255).all()


def test_a_wall_carries_each_caption_at_its_tile():
    figure = walls.synthetic_wall(np.ones((3, 13, 96, 96), np.float32), ["a", "b", "c"], columns=2)
    captions = figure.data[1]
    assert captions.text == ("a", "b", "c")
    assert [x // 98 for x in captions.x] == [0, 1, 0]
    assert [y // 98 for y in captions.y] == [0, 0, 1]


def test_a_wall_needs_a_caption_for_each_volume():
    with pytest.raises(ParameterError, match="0 captions, 1 volumes"):
        walls.synthetic_wall(np.ones((1, 13, 96, 96), np.float32), [])


@pytest.mark.parametrize(("role", "simulated"), [("public", False), ("private", True)])
def test_public_and_simulated_patients_may_be_shown(role, simulated):
    patients = FewPatients(role, simulated)
    assert len(walls.patient_wall(patients, [0, 1], ["ED", "ES"]).data) == 2
    assert figures.attribute_distributions({"cohort": patients}).data


def test_neither_images_nor_attributes_of_real_private_patients_are_shown():
    patients = FewPatients("private", False)
    with pytest.raises(PrivacyError):
        walls.patient_wall(patients, [0], ["ED"])
    with pytest.raises(PrivacyError):
        figures.attribute_distributions({"public": FewPatients("public", False), "private": patients})


def test_attribute_histograms_hold_every_known_value_and_skip_missing_ones():
    values = np.random.default_rng(0).normal(size=(50, 14)).astype(np.float32)
    values[:10, 3] = np.nan
    values[:, 5] = np.nan
    figure = figures.attribute_distributions({"synthetic": values, "other": values[:20].copy() * 2})
    shares = [sum(trace.y[:-1]) for trace in figure.data]
    assert len(shares) == 2 * (len(ATTRIBUTES) - 1)
    np.testing.assert_allclose(shares, 100, atol=0.2)


def test_the_tradeoff_draws_private_runs_with_their_intervals_and_every_reference():
    figure = figures.tradeoff(METRICS, {"kid": "KID"})
    private = next(trace for trace in figure.data if trace.name == "private")
    assert list(private.x) == [1, 10]
    assert list(private.y) == [5, 4]
    assert list(private.error_y.array) == [1.5, 1]
    assert list(private.error_y.arrayminus) == [1, 1]
    lines = {trace.name: trace.y[0] for trace in figure.data if trace.showlegend and trace.name != "private"}
    assert lines == {"public data only": 6, "no privacy": 3, "held-out patients": 1}
    bands = {(min(trace.y), max(trace.y)) for trace in figure.data if trace.fill == "toself"}
    assert bands == {(5, 7), (2, 4), (0.5, 1.5)}
    assert figure.layout.xaxis.type == "log"


def test_seeds_of_one_budget_are_averaged_and_their_intervals_joined():
    seeds = pd.concat([rows("kid", [(1, 4, 3, 5)]), rows("kid", [(1, 6, 5, 8)]).assign(run="another")])
    private = figures.tradeoff(seeds, {"kid": "KID"}).data[-1]
    assert (list(private.y), list(private.error_y.array), list(private.error_y.arrayminus)) == ([5], [3], [2])
    assert list(private.customdata[0])[-1] == 2


def test_the_tradeoff_names_what_the_table_lacks():
    with pytest.raises(ParameterError, match="fid"):
        figures.tradeoff(METRICS, {"fid": "FID"})
    with pytest.raises(ParameterError, match="at least one private run"):
        figures.tradeoff(rows("kid", [(0, 6, 5, 7)]), {"kid": "KID"})


def test_control_is_drawn_per_attribute_and_run():
    pairs = pd.DataFrame(
        {"attribute": ["LVEDV"] * 4 + ["RVEDV"] * 2, "requested": range(6), "measured": range(6), "run": ["a", "b"] * 3}
    )
    figure = figures.requested_and_measured(pairs)
    assert [title.text for title in figure.layout.annotations] == ["LVEDV (mL)", "RVEDV (mL)"]
    points = {(trace.name, trace.xaxis): list(trace.x) for trace in figure.data if trace.mode == "markers"}
    assert points == {("a", "x"): [0, 2], ("b", "x"): [1, 3], ("a", "x2"): [4], ("b", "x2"): [5]}


def test_training_curves_are_told_apart():
    curve = pd.DataFrame({"step": [0, 1, 0], "series": ["train", "train", "validation"], "value": [2.0, 1.0, 3.0]})
    assert {trace.name: list(trace.y) for trace in figures.training_curve(curve).data} == {
        "train": [2, 1],
        "validation": [3],
    }


def test_a_headline_that_can_not_be_drawn_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "headline.svg"
    path.write_text("old")
    monkeypatch.setattr(go.Figure, "write_image", lambda *_, **__: (_ for _ in ()).throw(ValueError("no kaleido")))
    with pytest.raises(StudyError, match="Chromium"):
        save_headline(go.Figure(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["headline.svg"]
    assert path.read_text() == "old"


def test_the_wall_is_compact():
    volumes = np.random.default_rng(0).random((24, 13, 96, 96), dtype=np.float32)
    size = len(walls.synthetic_wall(volumes, [""] * 24).to_json())
    assert size < 24 * 96 * 96 * 1.5  # noise does not compress: about a byte a pixel, in base64


RESPONSE = pd.DataFrame(
    {
        "moved": ["LVEDV", "LVEDV", "AGE", "AGE"],
        "attribute": ["LVEDV", "LVESV", "LVEDV", "LVESV"],
        "requested": [48.0, 20.0, 0.0, 0.0],
        "change": [24.0, 10.0, -0.1, math.nan],
        "low": [20.0, 8.0, -1.0, math.nan],
        "high": [30.0, 12.0, 1.0, math.nan],
        "n_patients": [9, 9, 9, 7],
        "requested_steps": [1.0, 0.45, 0.0, 0.0],
        "change_steps": [0.5, 0.23, -0.002, math.nan],
    }
)


def test_a_response_is_read_from_its_cell_with_what_was_asked_and_the_interval():
    heat = figures.response_matrix(RESPONSE).data[0]
    assert (list(heat.y), list(heat.x)) == (["LVEDV", "AGE"], ["LVEDV", "LVESV"])
    assert [list(row) for row in heat.text] == [["0.50<br>of 1.00", "0.23<br>of 0.45"], ["0.00", "not<br>read"]]
    np.testing.assert_array_equal(heat.z, [[0.5, 0.23], [-0.002, math.nan]])
    assert heat.customdata[0][0] == ("LVEDV moved by one step, LVEDV by 24 [20, 30] mL where 48 was asked; 9 patients")
    assert heat.zmin == -heat.zmax


def test_calibration_is_drawn_per_attribute_with_each_models_intervals_round_the_identity():
    columns = {"requested": [100, 200], "measured": [120, 180], "low": [110, 170], "high": [140, 185], "n_patients": 8}
    bins = pd.concat(
        [pd.DataFrame(columns).assign(attribute=a, run=r) for r in ("one", "two") for a in ("LVEDV", "RVEDV")]
    )
    figure = figures.requested_and_measured(bins)
    assert [title.text for title in figure.layout.annotations] == ["LVEDV (mL)", "RVEDV (mL)"]
    models = {(trace.name, trace.xaxis): trace for trace in figure.data if trace.name}
    assert set(models) == {(name, axis) for name in ("one", "two") for axis in ("x", "x2")}
    assert [trace.name for trace in figure.data if trace.showlegend] == ["one", "two"]
    colours = {key: trace.line.color for key, trace in models.items()}
    assert colours["one", "x"] == colours["one", "x2"] != colours["two", "x"] == colours["two", "x2"]
    errors = models["one", "x"].error_y
    assert (list(errors.array), list(errors.arrayminus)) == ([20, 5], [10, 10])
    identities = [trace for trace in figure.data if not trace.name]
    assert {(*trace.x, *trace.y) for trace in identities} == {(100, 200, 100, 200)}
    assert {trace.line.dash for trace in identities} == {"dot"}
    assert {trace.xaxis for trace in identities} == {"x", "x2"}


def test_hearts_beyond_the_public_ones_are_open_points():
    table = pd.DataFrame(
        {
            "attribute": "LVEDV",
            "requested": [30.0, 100.0, 600.0],
            "measured": [40.0, 100.0, math.nan],
            "low": [35.0, 90.0, math.nan],
            "high": [45.0, 110.0, math.nan],
            "n_patients": [9, 9, 2],
            "where": ["below", "inside", "above"],
            "run": "one",
        }
    )
    figure = figures.beyond_range(table)
    assert list(figure.data[-1].marker.symbol) == ["circle-open", "circle", "circle-open"]
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"


def test_arms_of_training_data_are_dots_with_their_intervals_panel_by_panel():
    points = [("public", "", "phase", 0.6), ("synthetic (ε = 1)", "", "phase", 0.5), ("public", "", "Dice LV", 0.7)]
    points += [("synthetic (ε = 1)", "public", "phase", -0.1)]
    rows = pd.DataFrame(points, columns=["training_set", "against", "metric", "value"]).assign(n_patients=9, run="run")
    rows = rows.assign(low=rows.value - 0.1, high=rows.value + 0.2)
    phase, dice = figures.utility_dots(rows).data
    assert dict(zip(phase.y, phase.x, strict=True)) == {"public": 0.6, "synthetic (ε = 1)": 0.5}
    assert (phase.error_x.array[0], phase.error_x.arrayminus[0]) == pytest.approx((0.2, 0.1))
    assert list(dice.y) == ["public"]


def test_every_figure_has_a_caption():
    drawing = {
        name for name, made in inspect.getmembers(figures, inspect.isfunction) if made.__module__ == figures.__name__
    }
    drawing = {name for name in drawing if inspect.signature(getattr(figures, name)).return_annotation is go.Figure}
    assert {name for name in drawing if not name.startswith("_")} - {"utility_dots"} == set(figures.CAPTIONS)
    points = {"attribute": ["LVEDV"] * 2, "requested": [1.0, 2], "measured": [1.0, 2], "run": "run"}
    drawn = {
        "tradeoff": figures.tradeoff(METRICS, {"kid": "KID"}),
        "response_matrix": figures.response_matrix(RESPONSE),
        "requested_and_measured": figures.requested_and_measured(pd.DataFrame(points)),
    }
    assert {name: figure.layout.meta["caption"] for name, figure in drawn.items()} == {
        name: figures.CAPTIONS[name] for name in drawn
    }
