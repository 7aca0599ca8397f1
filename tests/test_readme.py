"""README says what was measured and what is there."""

import json
import re

from benchmarks import first_contact
from cardiac_ldm.parameters import EvaluateParameters, FinetuneParameters, ReleaseParameters
from cardiac_ldm.trained import ROOT

README = (ROOT / "README.md").read_text()


def test_every_parameter_of_the_table_is_one() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", README, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"\w+", row)}
    assert names
    read = (EvaluateParameters, FinetuneParameters, ReleaseParameters)
    assert names <= {name for parameters in read for name in parameters.model_fields}


def test_the_times_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/first_contact.json").read_text())
    assert first_contact.SET_UP in measured["parts"]
    assert first_contact.sentence(measured["parts"]) in README.replace("\n", " ")


def test_every_file_that_it_links_is_there() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
