"""The fourteen attributes, measured on shapes whose volumes, thickness and angles are known in closed form."""

import numpy as np
import pytest

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES, measure_attributes
from cardiac_ldm.cohort.attributes import implausible, wall_thickness

SPACING = (10.0, 0.5, 1.0)


def cylinders(r_lv=25.0, wall=8.0, rv_offset=(-50.0, -20.0), n_slices=6):
    """Concentric LV cavity and wall, an RV of radius 15 mm at an (x right, y down) offset; pixels of 0.5 x 1 mm."""
    y, x = np.mgrid[-100:100:0.5, -100:100:1.0]
    radius = np.hypot(x, y)
    labels = np.zeros(x.shape, np.uint8)
    labels[np.hypot(x - rv_offset[0], y - rv_offset[1]) < 15] = 1
    labels[radius < r_lv + wall] = 2
    labels[radius < r_lv] = 3
    return np.stack([np.zeros_like(labels)] + n_slices * [labels])


def test_order_is_the_papers():
    papers = "LVEDV LVESV LVEF RVEDV RVESV RVEF MYOESTHICK MYOEDTHICK AGE SEX BMI ESED ANGLE DEPTH"
    assert " ".join(ATTRIBUTE_NAMES) == papers
    assert all(attribute.low < attribute.high for attribute in ATTRIBUTES)


def test_volumes_thickness_and_ejection_fraction_of_cylinders():
    measured = measure_attributes({"ED": cylinders(25, 8), "ES": cylinders(15, 12)}, SPACING)
    assert measured["LVEDV"] == pytest.approx(np.pi * 25**2 * 60 / 1000, rel=0.01)
    assert measured["LVESV"] == pytest.approx(np.pi * 15**2 * 60 / 1000, rel=0.02)
    assert measured["LVEF"] == pytest.approx(100 * (1 - (15 / 25) ** 2), abs=0.5)
    assert measured["RVEF"] == 0
    assert measured["MYOEDTHICK"] == pytest.approx(8, abs=0.1)
    assert measured["MYOESTHICK"] == pytest.approx(12, abs=0.1)
    assert measured["DEPTH"] == 6


@pytest.mark.parametrize(
    ("offset", "degrees"), [((-50, 0), 180), ((-50, -50), 135), ((0, -60), 90), ((-50, 50), 225), ((60, 1), 359)]
)
def test_angle_points_from_lv_to_rv_counter_clockwise_from_the_right(offset, degrees):
    assert measure_attributes({"ED": cylinders(rv_offset=offset)}, SPACING)["ANGLE"] == pytest.approx(degrees, abs=0.5)


def test_what_is_not_there_is_unknown():
    without_rv = np.where((labels := cylinders()) == 1, 0, labels)
    measured = measure_attributes({"ES": without_rv}, SPACING)
    unknown = {name for name, value in measured.items() if np.isnan(value)}
    assert unknown == {"LVEDV", "LVEF", "RVEDV", "RVEF", "MYOEDTHICK", "ANGLE"}


def test_open_slices_above_the_valve_do_not_thin_the_wall():
    labels = cylinders()
    labels[0, 200, 100] = 3
    assert measure_attributes({"ED": labels}, SPACING)["MYOEDTHICK"] == pytest.approx(8, abs=0.1)


def test_no_slice_with_a_cavity_has_no_thickness():
    assert np.isnan(wall_thickness(np.empty(0), np.empty(0)))


def test_limits_enclose_the_ranges_and_the_values_of_hearts():
    for attribute in ATTRIBUTES:
        low, high = attribute.limits
        assert low <= attribute.low < attribute.high <= high
        for value in (low, attribute.low, high):
            assert implausible(attribute.name, value) is None
        for value in (low - 0.01, high + 0.01, float("nan"), float("inf")):
            assert implausible(attribute.name, value)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("LVEDV", 0.15, "LVEDV is 0.15, expected 10 to 900 mL; it looks like litres: give 150"),
        ("RVEF", 0.58, "RVEF is 0.58, expected 2 to 95 %; it looks like a fraction: give 58"),
        ("AGE", 650, "AGE is 650, expected 1 to 120 years; it looks like months: give 54.17"),
        ("AGE", 22000, "AGE is 22000, expected 1 to 120 years; it looks like days: give 60.23"),
        ("MYOEDTHICK", 0.9, "MYOEDTHICK is 0.9, expected 2 to 50 mm; it looks like centimetres: give 9"),
        ("MYOESTHICK", 0.012, "MYOESTHICK is 0.012, expected 2 to 60 mm; it looks like metres: give 12"),
        ("BMI", 2.45, "BMI is 2.45, expected 8 to 100 kg/m2; it looks like g/cm2: give 24.5"),
        ("BMI", 0.035, "BMI is 0.035, expected 8 to 100 kg/m2; it looks like lb/in2: give 24.61"),
        ("ANGLE", -90, "ANGLE is -90, expected 0 to 360 degrees; correct it"),
        ("SEX", 0.5, "SEX is 0.5; expected 0 or F for female, 1 or M for male"),
        ("AGE", -3, "AGE is -3, expected 1 to 120 years; correct it"),
    ],
)
def test_a_value_beyond_the_limits_is_told_with_the_unit_it_seems_to_be_in(name, value, told):
    assert implausible(name, value) == told
