"""A run that is asked to end saves its step and ends, all of its processes with the same one."""

import os
import signal

import pytest

from tests import processes, toy
from tests.test_checkpoints import assert_same, opened
from train import signals
from train.signals import stopping


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_is_answered_at_the_end_of_the_step(number, code, capfd):
    before = signal.getsignal(number)
    with stopping() as stop:
        assert not stop.agreed() and stop.code == 0
        os.kill(os.getpid(), number)
        assert stop.agreed() and stop.code == code
    assert signal.getsignal(number) is before
    assert f"{number.name}: ends after this step, which is saved" in capfd.readouterr().err


def test_a_second_signal_ends_at_once(monkeypatch, capfd):
    monkeypatch.setattr(signals.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as end, stopping():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert end.value.code == 130
    assert "SIGINT again: ended at once" in capfd.readouterr().err


def test_all_processes_save_the_same_step_when_one_is_asked(tmp_path):
    args = ["-m", "tests.toy", str(tmp_path), "--mesh", "4x2", "--steps", "100000"]
    args += ["--every", "100000", "--sleep", "0.02"]
    with processes.started(args, 2, devices=4) as (first, second):
        first.wait_for("step 5\n", 60)
        second.send(signal.SIGTERM)
        assert [first.wait(60), second.wait(60)] == [0, 0], first.err + second.err
        ended = {process.out.splitlines()[-1] for process in (first, second)}
    assert len(ended) == 1
    with opened(tmp_path) as there:
        assert ended == {f"ended with {there.latest}"}
        assert_same(there.restore(toy.abstract("8"))[0], toy.after(int(there.latest)))
