import gzip
import json
import re
import sys
from base64 import b64decode
from types import ModuleType, SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from cardiac_ldm.cohort import GRID, Patients, load_manifest
from cardiac_ldm.cohort.grid import place_on_grid
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.report.viewer import nifti, show_patients, show_synthetic, view_live


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
    header = nib.Nifti1Image.from_bytes(gzip.decompress(nifti(np.zeros((13, 96, 96), np.uint8)))).header
    assert header.get_xyzt_units() == ("mm", "unknown")
    assert (header["sform_code"], header["qform_code"]) == (2, 2)
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-4)
    assert header["descrip"].item().startswith(b"cardiac_ldm")


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


def test_the_live_view_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "itkwidgets", None)
    with pytest.raises(ParameterError, match=re.escape('pip install "cardiac-ldm[live]"')):
        view_live(np.zeros((13, 96, 96), np.float32))


def test_the_live_view_passes_the_spacing(monkeypatch):
    class Image:
        spacing: list[float]

        def SetSpacing(self, spacing):  # noqa: N802
            self.spacing = spacing

    itk, itkwidgets = ModuleType("itk"), ModuleType("itkwidgets")
    monkeypatch.setattr(itk, "image_from_array", lambda voxels: Image(), raising=False)
    monkeypatch.setattr(itkwidgets, "view", lambda image: image, raising=False)
    monkeypatch.setitem(sys.modules, "itk", itk)
    monkeypatch.setitem(sys.modules, "itkwidgets", itkwidgets)
    assert view_live(np.zeros((13, 96, 96), np.float32)).spacing == pytest.approx(GRID.spacing_mm[::-1])  # type: ignore[attr-defined]
