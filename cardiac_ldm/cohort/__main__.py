"""The command line of cohorts: python -m cardiac_ldm.cohort check data_manifests/x.yaml."""

import argparse
import sys
from pathlib import Path

from cardiac_ldm.cohort.check import check
from cardiac_ldm.errors import StudyError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m cardiac_ldm.cohort", description="Look after a cohort's files.")
    command = parser.add_subparsers(required=True).add_parser(
        "check",
        help="read every patient and say what is there, missing, wrong or mended; exit code 1 if anything is wrong",
    )
    command.add_argument("manifest", help="path of a manifest, or its name in data_manifests/")
    command.add_argument("--data-root", type=Path, help="the data folder, where it's another than the manifest's")
    arguments = parser.parse_args()
    try:
        sys.exit(0 if check(arguments.manifest, arguments.data_root) else 1)
    except StudyError as error:
        sys.exit(str(error))
