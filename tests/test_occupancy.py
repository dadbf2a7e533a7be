"""The measurement of the pipeline's occupancy, and, slowly, what it finds on two cores."""

import pytest

from liveavatar_jax import occupancy
from liveavatar_jax.types import LiveAvatarError

SECONDS = {"sequence": 0.4, "two sequences": 0.2}


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """What was run, in order; nothing is, and figures are made up."""
    order: list[str] = []

    def run(name: str, size: str, blocks: int) -> dict:
        order.append(name)
        busy = [0.9] * len(occupancy.VARIANTS[name])
        seconds = SECONDS.get(name, 0.25) * (1 + (len(order) > len(occupancy.VARIANTS)))
        return {"seconds": seconds, "busy": busy, "slots": 0.99, "others": 0.01}

    monkeypatch.setattr(occupancy, "_run", run)
    monkeypatch.setattr(occupancy.os, "sched_getaffinity", lambda _: {0, 1})
    return order


def test_variants_take_turns_and_each_is_compared_with_the_sequence_beside_it(made):
    report = occupancy.measure("tiny", rounds=2)
    assert made == [*occupancy.VARIANTS] * 2
    rows = {row["variant"]: row for row in report["variants"]}
    # A machine that was half as fast in the second round says nothing about the speed-up.
    assert rows["sequence"]["speedup"] == 1 and rows["two sequences"]["speedup"] == 2
    assert rows["pipeline"]["speedup"] == pytest.approx(1.6)
    assert rows["sequence"]["min"] == 0.4 and rows["sequence"]["max"] == 0.8
    assert rows["bound stages"]["busy"] == [0.9, 0.9]
    lines = occupancy.table(report).splitlines()
    assert len(lines) == 1 + len(occupancy.VARIANTS) and len({len(line) for line in lines}) == 1


def test_one_core_is_too_few(made, monkeypatch):
    monkeypatch.setattr(occupancy.os, "sched_getaffinity", lambda _: {1})
    with pytest.raises(LiveAvatarError, match="two cores"):
        occupancy.measure("tiny", rounds=1)
    assert not made


def test_a_measured_process_runs_the_pipeline_from_empty_to_empty():
    found = occupancy.work({"size": "tiny", "blocks": 3, "mesh": "stage=2"})
    assert found["slots"] == 3 / 4
    assert 0 < found["cpu"] and 0 < found["wall"]
    # /proc/stat counts in hundredths of a second, and no program runs on more than all cores.
    assert found["cpu"] <= found["machine"] + 0.1


@pytest.mark.slow
def test_two_stages_on_two_cores_are_16_times_as_fast_as_the_steps_in_sequence_on_one():
    report = occupancy.measure("laptop", rounds=3, blocks=20)
    rows = {row["variant"]: row for row in report["variants"]}
    others = max(row["others"] for row in rows.values())
    if others > 0.1:
        pytest.skip(f"other programs took {others:.0%} of the cores meanwhile")
    assert rows["bound stages"]["speedup"] >= 1.6, occupancy.table(report)
    assert min(rows["bound stages"]["busy"]) > 0.9
