"""README says what was measured and what is there."""

import json
import re

from cardiac_ldm.parameters import EvaluateParameters, FinetuneParameters
from cardiac_ldm.study import ROOT

README = (ROOT / "README.md").read_text()


def test_the_times_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "first_contact.json").read_text())["parts"]
    times = re.search(r"`make time`[^:]*:(.*?)\n\n", README, re.DOTALL)
    assert times
    said = dict(re.findall(r"([\w`-]+) takes? ([\d.]+) min", times[1].replace("\n", " ")))
    assert said
    for part, minutes in said.items():
        assert minutes == f"{measured[part.strip('`')]['seconds'] / 60:.1f}", part


def test_every_parameter_of_the_table_is_one() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", README, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"\w+", row)}
    assert names
    assert names <= {*EvaluateParameters.model_fields, *FinetuneParameters.model_fields}


def test_every_file_that_it_links_is_there() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
