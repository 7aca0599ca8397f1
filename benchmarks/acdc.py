"""ACDC's patients in two halves, for the benchmarks that hold the phantoms against real hearts."""

import os
from argparse import ArgumentParser
from pathlib import Path

from cardiac_ldm.cohort import Manifest, Patients, load_manifest, prepare
from cardiac_ldm.errors import CohortError
from cardiac_ldm.trained import ROOT

RUNS = Path(os.environ.get("CARDIAC_LDM_RUNS", ROOT / "runs"))


def parser(description: str | None) -> ArgumentParser:
    """Arguments of a script that reads ACDC: where it is."""
    arguments = ArgumentParser(description=description)
    arguments.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("CARDIAC_LDM_ROOT_ACDC"),
        help="folder in ACDC's layout; else the environment's CARDIAC_LDM_ROOT_ACDC",
    )
    return arguments


def halves(data: Path | None) -> tuple[list[Patients], list[Patients]]:
    """Prepare every patient of a folder in ACDC's layout: every other one by name, and the rest (in two parts).

    Raises CohortError where there are fewer than four.
    """
    names = sorted(path.parent.name for path in Path(data).glob("*/Info.cfg")) if data else []
    if len(names) < 4:
        raise CohortError(f"{data}: expected ACDC's folders patient001, patient002, ...; name their folder with --data")
    said = load_manifest("acdc").model_dump()
    said["splits"] = {"train": names[::2], "validation": names[1:2], "test": names[3::2]}
    cohort = prepare(Manifest.model_validate(said), store=RUNS / "cohorts", data_root=data)
    return [cohort.split("train")], [cohort.split("validation"), cohort.split("test")]
