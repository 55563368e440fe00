"""What a job is thought to need of a GPU's memory, against what is known of SDXL."""

import dataclasses

import pytest

from service.jobs import SampleSettings
from service.memory import memory_of, values_out
from tests.test_cost import sdxl_shapes  # noqa: F401 (a fixture)
from tests.test_tiles import job

GIB = 2**30
NO_IMAGES = SampleSettings((), (), 50, 5.0, 1024, 1024)


def test_sdxl_keeps_5_gib_of_a_row_at_1024(sdxl_shapes: dict[str, tuple[int, ...]]) -> None:  # noqa: F811
    assert 3.14 * values_out(sdxl_shapes, 128, 128) == pytest.approx(5.2 * GIB, rel=0.01)
    one = dataclasses.replace(job(0, 0), samples=NO_IMAGES)
    optimised = dataclasses.replace(one, method="ziplora", knobs={"steps": 100})
    need = memory_of(sdxl_shapes, 1024, 8)
    assert need(optimised) == pytest.approx((4.8 + 1 + 2 * 5.2) * GIB, rel=0.05)  # weights, CUDA, both terms of Eq. 3
    assert need(one) < 8 * GIB  # no way back
    tried = [{"method": "direct", "knobs": {}}, {"method": "ziplora", "knobs": {"steps": 100}}]
    assert need(dataclasses.replace(one, method="best", knobs={"of": tried})) == need(optimised)
    assert memory_of(sdxl_shapes, 512, 8)(optimised) < 10 * GIB
