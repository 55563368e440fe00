"""How many workers a run has, and what no cluster could give."""

import pytest

from service.crew import Crew
from service.errors import BadInput


def test_a_fixed_number_stays_and_a_range_follows_the_work() -> None:
    assert Crew().begin_with(there=3, jobs=100) == 3
    assert Crew().begin_with(there=0, jobs=100) == 1
    assert Crew(5, 5).begin_with(there=2, jobs=100) == 5
    assert Crew(5, 5).begin_with(there=2, jobs=4) == 4
    assert not Crew(5, 5).is_elastic
    elastic = Crew(2, 8)
    assert elastic.is_elastic
    assert [elastic.begin_with(there, 100) for there in (0, 4, 20)] == [2, 4, 8]
    assert [elastic.aim(wanted) for wanted in (0, 5, 500)] == [2, 5, 8]
    assert Crew(None, 8).begin_with(there=0, jobs=100) == 1


@pytest.mark.parametrize(
    ("crew", "message"),
    [
        (Crew(8, 2), "at least 8 workers and at most 2"),
        (Crew(gpus=2), "a worker uses one GPU at most"),
        (Crew(gpus=0), "a worker uses one GPU at most"),
    ],
)
def test_wishes_that_contradict_themselves_are_refused(crew: Crew, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        crew.check()


def test_what_the_nodes_lack_is_said_before_anybody_waits_for_it() -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0, "accelerator_type:A100": 1.0}, {"CPU": 8.0}]
    labels = [{"zone": "a"}, {"zone": "b"}]
    Crew(accelerator_type="A100", labels={"zone": "b"}).check_nodes(nodes, labels)
    with pytest.raises(BadInput, match="no node has the accelerator type H100; there are: A100"):
        Crew(accelerator_type="H100").check_nodes(nodes, labels)
    with pytest.raises(BadInput, match="no node has the label zone=c; there are: a, b"):
        Crew(labels={"zone": "c"}).check_nodes(nodes, labels)
    Crew(1, 4, accelerator_type="H100").check_nodes(nodes, labels)  # such a node may yet come
    with pytest.raises(BadInput, match=r"a node offers 0\.5 GPUs.*--gpus-per-worker 0\.5"):
        Crew().check_nodes([{"GPU": 0.5}], [{}])
    Crew(gpus=0.5).check_nodes([{"GPU": 0.5}], [{}])
