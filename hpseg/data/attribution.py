"""Where photographs come from: ATTRIBUTION.tsv, a table of theirs in their folder."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from hpseg.run.errors import UsageError

TABLE = "ATTRIBUTION.tsv"


def attributed(folder: Path, photos: Sequence[Path]) -> list[dict[str, str]]:
    """What is known of every photograph: "file", relative to `folder`, and its row of the nearest table above it.

    A table is tab-separated, with a header that has a column "file", the name of the photograph: in the table's folder,
    or in any folder below.
    """
    tables: dict[Path, dict[str, dict[str, str]]] = {}

    def rows(place: Path) -> dict[str, dict[str, str]]:
        if place not in tables:
            table = place / TABLE
            if table.is_file():
                tables[place] = _read(table)
            else:
                tables[place] = rows(place.parent) if place not in (folder, place.parent) else {}
        return tables[place]

    known = []
    for path in photos:
        row = rows(path.parent).get(path.name, {})
        facts = {key: value for key, value in row.items() if isinstance(value, str) and key != "file"}
        inside = path.is_relative_to(folder)
        known.append({"file": (path.relative_to(folder) if inside else path).as_posix(), **facts})
    return known


def _read(table: Path) -> dict[str, dict[str, str]]:
    try:
        with table.open(encoding="utf-8", newline="") as lines:
            found = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"photos: {table}: expected a tab-separated table in UTF-8 ({error})") from None
    return {row["file"]: row for row in found if row.get("file")}
