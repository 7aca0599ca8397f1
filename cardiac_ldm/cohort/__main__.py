"""The command line of cohorts: look at a folder and write a manifest; read all of a cohort and say what is wrong."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cardiac_ldm.cohort.check import check
from cardiac_ldm.cohort.grid import Localiser
from cardiac_ldm.cohort.new import new
from cardiac_ldm.errors import StudyError


def main(arguments: Sequence[str] | None = None, localiser: Localiser | None = None) -> int:
    """The command line; returns the exit code: 0 if all is sound, else 1. Wrong usage exits with 2."""
    parser = argparse.ArgumentParser(prog="python -m cardiac_ldm.cohort", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("check", help="read every patient; print what is there, missing, wrong or mended")
    command.add_argument("manifest", help="path of a manifest, or its name in data_manifests/")
    command.add_argument("--data-root", type=Path, help="the data folder, where it's another than the manifest's")
    command.add_argument("--page", type=Path, help="an HTML file to write: every patient's slices, and what is doubted")
    command = commands.add_parser("new", help="look at a data folder, guess its layout and write a manifest to correct")
    command.add_argument("folder", type=Path, help="the data folder")
    command.add_argument("--out", type=Path, help="the manifest to write; else data_manifests/<the folder's name>.yaml")
    given = parser.parse_args(arguments)
    try:
        if given.command == "new":
            new(given.folder, given.out)
            return 0
        return 0 if check(given.manifest, given.data_root, given.page, localiser) else 1
    except StudyError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    from cardiac_ldm.training.shipped import (
        ShippedFinder,  # this command stands above the rooms, and the room below them
    )

    sys.exit(main(localiser=ShippedFinder()))
