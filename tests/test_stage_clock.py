"""Where the time of a step goes: stages inside stages are counted once."""

from __future__ import annotations

import time

import pytest
import torch

from pretrain.run_log import StageClock


def test_a_stage_inside_another_is_counted_once() -> None:
    clock = StageClock(torch.device("cpu"))
    started = time.perf_counter()
    with clock.stage("objective"):
        time.sleep(0.02)
        for _ in range(2):
            with clock.stage("gather"):
                time.sleep(0.03)
                with clock.stage("inner"):
                    time.sleep(0.01)
    with clock.stage("step"):
        pass
    whole_s = time.perf_counter() - started
    times = clock.take()
    assert sum(times.values()) == pytest.approx(whole_s, rel=0.02)
    assert times["time_s/objective"] >= 0.02
    assert times["time_s/gather"] >= 0.06
    assert times["time_s/inner"] >= 0.02
    assert times["time_s/objective"] < times["time_s/gather"]  # 20 ms against 60 ms: the inner stages are not in it
    assert clock.take() == {}


def test_an_error_inside_a_stage_leaves_the_clock_whole() -> None:
    clock = StageClock(torch.device("cpu"))
    with pytest.raises(RuntimeError), clock.stage("objective"), clock.stage("gather"):
        raise RuntimeError
    with clock.stage("step"):
        time.sleep(0.01)
    assert clock.take()["time_s/step"] >= 0.01
