import gzip
import json
import math
import re
from base64 import b64decode
from types import SimpleNamespace
from uuid import uuid4

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.session import Session
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from cardiac_ldm.cohort import GRID, Patients, load_manifest
from cardiac_ldm.cohort.grid import place_on_grid
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.report.live import loader
from cardiac_ldm.report.viewer import nifti, show_levels, show_patients, show_synthetic, view


class FewPatients(Patients):
    """Two volumes that need no store."""

    def __init__(self, role: str, simulated: bool) -> None:
        secret = role == "private" and not simulated
        self._manifest = SimpleNamespace(name="few", role=role, simulated=simulated, secret=secret)  # type: ignore[assignment]

    def images(self, volumes):
        return np.random.default_rng(0).random((2, 13, 96, 96), dtype=np.float32)[list(volumes)]


def test_volumes_are_embedded_on_the_studys_grid_and_every_voxel_survives_to_8_bits():
    volume = np.random.default_rng(0).random((13, 96, 96), dtype=np.float32)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(nifti(volume)))
    np.testing.assert_allclose(image.header.get_zooms(), GRID.spacing_mm[::-1], rtol=1e-6)
    restored = np.asarray(image.dataobj).transpose(2, 1, 0) / 255
    np.testing.assert_allclose(restored, volume, atol=0.5 / 255 + 1e-6)


def test_a_volume_lies_as_a_radiologist_sees_it_with_its_base_up_and_its_centre_at_the_origin():
    image = nib.Nifti1Image.from_bytes(gzip.decompress(nifti(np.zeros((13, 96, 96), np.float32))))
    assert nib.aff2axcodes(image.affine) == ("L", "P", "I")
    np.testing.assert_allclose(image.affine @ [47.5, 47.5, 6, 1], [0, 0, 0, 1], atol=1e-3)


def test_a_volumes_header_says_how_it_lies_twice_and_in_mm():
    header = nib.Nifti1Image.from_bytes(gzip.decompress(nifti(np.zeros((13, 96, 96), np.uint8), "synthetic"))).header
    assert header.get_xyzt_units() == ("mm", "sec")
    assert (header["sform_code"], header["qform_code"]) == (2, 2)
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-4)
    assert header["descrip"].item() == b"synthetic"


@pytest.mark.parametrize("number", range(8))
def test_the_right_ventricle_lies_on_the_patients_right_and_the_base_above_the_apex(number):
    patient = read_patient(load_manifest("phantom_private"), None, f"p{number:06d}", imaged=False)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(nifti(place_on_grid(patient).labels[0])))
    at = {structure: np.argwhere(np.asarray(image.dataobj) == structure) for structure in (1, 2, 3)}
    rv, _, lv = (nib.affines.apply_affine(image.affine, voxels).mean(axis=0) for voxels in at.values())
    assert rv[0] > lv[0] + 10
    area = np.bincount(at[3][:, 2], minlength=13)  # the cavity narrows towards the apex
    z = nib.affines.apply_affine(image.affine, [[48, 48, k] for k in range(13)])[:, 2]
    shown = np.flatnonzero(area)
    assert np.corrcoef(z[shown], area[shown])[0, 1] > 0.3


def test_every_volume_is_shown_under_its_title_and_a_title_can_not_end_the_script():
    titles = ["ED", "</script><b>"]
    html = show_synthetic(np.zeros((2, 13, 96, 96), np.float32), titles)._repr_html_()
    (payload,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    volumes = json.loads(payload)["volumes"]
    assert [volume["title"] for volume in volumes] == titles
    assert all(b64decode(volume["nifti"])[:2] == b"\x1f\x8b" for volume in volumes)


def test_there_must_be_a_title_for_each_volume():
    with pytest.raises(ParameterError, match="1 titles, 2 volumes"):
        show_synthetic(np.zeros((2, 13, 96, 96), np.float32), ["ED"])


@pytest.mark.parametrize(("role", "simulated"), [("public", False), ("private", True)])
def test_public_and_simulated_patients_may_be_shown(role, simulated):
    assert "bk-volumes" in show_patients(FewPatients(role, simulated), [1], ["ES"])._repr_html_()


def test_real_private_patients_are_never_shown():
    with pytest.raises(PrivacyError, match="few"):
        show_patients(FewPatients("private", False), [0], ["ED"])


def test_a_volume_is_viewed_with_its_labels_on_the_same_grid():
    volume, labels = np.zeros((13, 96, 96), np.float32), np.zeros((13, 96, 96), np.uint8)
    labels[3, 40, 50] = 2
    (payload,) = re.findall(r"json\">(.*?)</script>", view(volume, labels)._repr_html_(), re.DOTALL)  # type: ignore[attr-defined]
    (shown,) = json.loads(payload)["volumes"]
    image, overlay = (nib.Nifti1Image.from_bytes(gzip.decompress(b64decode(shown[key]))) for key in ("nifti", "labels"))
    np.testing.assert_array_equal(overlay.affine, image.affine)
    np.testing.assert_array_equal(np.asarray(overlay.dataobj).transpose(2, 1, 0), labels)


@pytest.mark.parametrize(
    ("volume", "labels", "message"),
    [
        (np.zeros((2, 13, 96, 96), np.float32), None, "one volume"),
        (np.zeros((13, 96, 96), np.float32), np.zeros((12, 96, 96), np.uint8), "don't fit"),
        (np.zeros((13, 96, 96), np.float32), np.full((13, 96, 96), 4, np.uint8), "labels are 0 to 3"),
    ],
)
def test_what_cannot_be_viewed_is_refused(volume, labels, message):
    with pytest.raises(ParameterError, match=message):
        view(volume, labels)


def test_a_dial_of_attributes_tells_what_was_requested_and_measured_and_holds_each_picture_once():
    levels = pd.DataFrame(
        {
            "attribute": ["LVEDV"] * 3 + ["LVEF"] * 3,
            "phase": ["ED"] * 3 + ["ES"] * 3,
            "requested": [100.0, 150, 200, 40, 50, 60],
            "measured": [110.0, math.nan, 190, 41, 52, 63],
        }
    )
    images = np.zeros((6, 13, 96, 96), np.float32)
    html = show_levels(images, levels, "ε = 1")._repr_html_()
    (payload,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    told = json.loads(payload)
    assert told["badge"] == "synthetic, ε = 1"
    assert [part["phase"] for part in told["attributes"]] == ["ED", "ES"]
    assert told["attributes"][0]["levels"][:2] == [
        {"requested": "100 mL", "measured": "110 mL"},
        {"requested": "150 mL", "measured": "not read"},
    ]
    assert html.count("data:image/png") == 1
    for some, table in ((images[:5], levels), (images[:5], levels[:5])):
        with pytest.raises(ParameterError, match="equally many"):
            show_levels(some, table, "ε = 1")


class FrontEnd(Session):
    """Messages as a browser's: each has an identifier of its own, where Python's clients number theirs."""

    @property
    def msg_id(self) -> str:
        return uuid4().hex


@pytest.mark.parametrize(
    ("session", "seen_by"),
    [(Session, "None"), (FrontEnd, "'other'")],
)
def test_only_a_front_end_gets_the_script_that_draws(session, seen_by):
    notebook = new_notebook(
        cells=[
            new_code_cell("from cardiac_ldm.report.live import front_end\nprint(repr(front_end()))"),
            new_code_cell("from cardiac_ldm.report.viewer import VolumeViewer\nVolumeViewer('<p>heart</p>')"),
        ]
    )
    manager = AsyncKernelManager(kernel_name="python3", session=session(username=""))
    requested, shown = NotebookClient(notebook, km=manager, timeout=120).execute().cells
    assert requested.outputs[0].text.strip() == seen_by
    html = shown.outputs[0].data["text/html"]
    assert (html == "<p>heart</p>") == (session is Session)


def test_without_the_library_live_volumes_say_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.setattr("cardiac_ldm.report.live.ASSETS", tmp_path)
    assert "python book/_ext/vendored.py" in loader("bk-volumes")


def test_a_dial_of_attributes_needs_no_library_live():
    assert "drawLevels" in loader("bk-levels")
    assert len(loader("bk-levels")) < 60_000
