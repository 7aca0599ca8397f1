"""Tables: CSV files as spreadsheets write them, read as text. Every reader reads its tables here."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from cardiac_ldm.cohort.nifti import on_a_line

UNKNOWN = ("", "nan", "na", "n/a", "#n/a", "none", "null")
"""What stands in a cell of which nothing is known, in small letters."""
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")


def ukbb_field(name: str) -> str:
    """A UK Biobank column as field-instance.array (21003-2.0), from the ways in which it's been exported.

    participant.p21003_i2, p21003_i2 and p31 are the Research Analysis Platform's, f.21003.2.0 is ukbconv's.
    """
    name = name.removeprefix("participant.")
    if found := re.fullmatch(r"p(\d+)(?:_i(\d+))?(?:_a(\d+))?|f\.(\d+)\.(\d+)\.(\d+)", name):
        field, instance, array = (found[i] or found[i + 3] or "0" for i in (1, 2, 3))
        return f"{field}-{instance}.{array}"
    return name.removeprefix("f.") if name == "f.eid" else name


@lru_cache(maxsize=4)
def read_table(
    place: Path,
    modified: int,
    key: str,
    needed: Sequence[str],
    optional: Sequence[str] = (),
    others: bool = True,
    named: Callable[[str], str] = str,
) -> pd.DataFrame:
    """A CSV's rows as text, indexed by the column `key`; cached until the file is modified (st_mtime_ns).

    Cells are separated by commas, or by semicolons, and numbers then have decimal commas, which become points; a first
    line `sep=;` is heeded. Cells of which nothing is known are empty. needed: columns that must be there, optional:
    those that may. others: whether there may be more, left unread. named: our name for a column's.

    Raises ValueError that says what is wrong and what to do.
    """
    wanted = (key, *needed, *optional)
    rows: list[list[str]] = []
    try:
        lines, separator, said = _lines(place.read_bytes().decode("utf-8-sig"))
        header = [named(name.strip()) for name in next(lines, [])]
        kept = [index for index, name in enumerate(header) if name in wanted]
        for line in lines:
            cells = [cell.strip() for cell in line]
            if any(cells) and (len(cells) < len(header) or any(cells[len(header) :])):
                raise ValueError(f"line {lines.line_num + said} has {len(cells)} cells, the header {len(header)}")
            if any(cells):
                rows.append([_cell(cells[i], header[i] == key, separator) for i in kept])
    except (csv.Error, ValueError) as error:
        how = "save it as UTF-8 with commas between cells (in Excel: CSV UTF-8)"
        raise ValueError(f"can't be read as CSV ({on_a_line(error)}); {how}") from error
    if missing := [name for name in (key, *needed) if name not in header]:
        hint = "put commas between cells" if {";", "\t"} & set("".join(header)) else "is the first line the header?"
        raise ValueError(f"has no column {', '.join(missing)}, but {on_a_line(', '.join(header) or 'none')}; {hint}")
    unknown = [name for name in header if name not in wanted and not others]
    if twice := unknown or [name for name, n in Counter(header).items() if n > 1 and name in wanted]:
        what = "an unknown column" if unknown else "twice the column"
        raise ValueError(f"has {what} {twice[0]!r}; remove it, or name it one of {', '.join(wanted)}")
    if not rows:
        raise ValueError("has no rows; add the patients")
    table = pd.DataFrame(rows, columns=[header[index] for index in kept], dtype=object)
    if n := int((table[key] == "").sum()):
        raise ValueError(f"has {n} rows without {key}; fill them in")
    return table.set_index(key).sort_index()


def header_of(text: str) -> list[str]:
    """The names in a CSV's first line, as `read_table` sees them; none of what isn't CSV."""
    try:
        return [name.strip() for name in next(_lines(text)[0], [])]
    except csv.Error:
        return []


def _lines(text: str) -> tuple[Any, str, bool]:
    """A reader of a CSV's lines, what separates its cells, and whether a first line said that."""
    first, _, rest = text.partition("\n")
    said = re.fullmatch(r'"?sep=([,;])"?', first.strip(), re.IGNORECASE)
    separator = said[1] if said else ";" if ";" in first and "," not in first else ","
    # as it is: a cell may hold the end of a line
    lines = csv.reader(io.StringIO(rest if said else text, newline=""), strict=True, delimiter=separator)
    return lines, separator, bool(said)


def _cell(text: str, is_key: bool, separator: str) -> str:
    if is_key:
        return text
    if text.lower() in UNKNOWN:
        return ""
    return text.replace(",", ".") if separator == ";" and _DECIMAL_COMMA.fullmatch(text) else text
