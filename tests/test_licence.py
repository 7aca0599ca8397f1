"""What the project says of its licence and of how to cite it, in the files where people and machines look."""

import datetime
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_is_of_this_version_under_this_licence_and_names_the_paper(project: dict[str, Any]) -> None:
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert said["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(said)  # what the format requires
    assert said["version"] == project["version"]
    assert said["license"] == project["license"] == "Apache-2.0"
    assert datetime.date.fromisoformat(said["date-released"])
    assert [author["name"] for author in said["authors"]] == ["The cardiac_ldm authors"]
    (paper,) = said["references"]
    assert paper["url"] == "https://arxiv.org/abs/2407.16405"
    assert paper["authors"][0]["family-names"] == "Daum"


def test_the_licence_is_there_whole_and_goes_with_the_package(project: dict[str, Any]) -> None:
    assert project["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    for part in ("Version 2.0, January 2004", "3. Grant of Patent License.", "9. Accepting Warranty", "APPENDIX:"):
        assert part in text, part
