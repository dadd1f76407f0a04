"""The error that makes strategies tie is the one that validation finds."""

from statistics import median

import pytest
from tests.resources.cases import machine

from pipermoe.planner.error_band import error_band
from pipermoe.specs.platform_file import load_platform, platform_names
from pipermoe.validate.accuracy import validate_rows
from pipermoe.validate.rows import published_rows


def test_every_machine_has_a_band_with_its_source():
    for name in platform_names():
        platform = load_platform(name)
        for ranks in (1, platform.levels[-1].ranks):
            band = error_band(platform, ranks)
            assert 0 < band.error < 1
            assert band.source
    assert "measured" in error_band(machine(), 4).source


@pytest.mark.slow
def test_bands_of_validated_classes_are_the_medians_of_their_rows():
    rows = [row for row in validate_rows(published_rows()).rows if row.role in ("twin", "unseen")]
    for name, gpus in {"dgx-h100": ("A100", "H100", "B200", "B300", "GB200", "GB300"), "mi355x": ("MI355X",)}.items():
        platform = load_platform(name)
        for several in (True, False):
            mine = [row for row in rows if row.gpu.startswith(gpus) and (row.n_gpus > 8) == several]
            band = error_band(platform, platform.host.ranks * (1 + several))
            assert band.error == pytest.approx(median(abs(row.error) for row in mine), abs=0.03)
