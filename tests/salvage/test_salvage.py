"""What a salvage finds in images, and that it is never wrong."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.salvage import bed as beds
from tests.salvage.bed import Bed


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return beds.make(tmp_path_factory.mktemp("bed"))


def one(bed: Bed, tmp_path: Path, number: int) -> list[int]:
    """The versions that come out of a random image."""
    image = tmp_path / "disk.img"
    beds.random_image(random.Random(number), bed, image)
    outdir = tmp_path / "out"
    report = beds.run(outdir, image)
    versions = beds.check(bed, report, tmp_path / "state.sqlite3")
    for path in outdir.iterdir():
        path.unlink()
    outdir.rmdir()
    return versions


def test_what_is_found_is_never_wrong(bed: Bed, tmp_path: Path) -> None:
    found = [one(bed, tmp_path, number) for number in range(60)]
    assert sum(bed.version in versions for versions in found) > 10, "far too little is found"


@pytest.mark.soak
def test_two_thousand_images(bed: Bed, tmp_path: Path) -> None:
    for number in range(1000, 3000):
        one(bed, tmp_path, number)
