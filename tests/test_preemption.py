"""What ranks agree on at a step boundary, and what they do when one of them does not answer.

pytest tests/test_preemption.py
"""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from utils.faults import preemption
from utils.faults.preemption import Agreement, Decision, PeersLostError, StopRequest

SECONDS = timedelta(seconds=30)


class Work:
    """An exchange that another rank answers after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.due = time.monotonic() + seconds

    def is_completed(self) -> bool:
        return time.monotonic() >= self.due

    def wait(self) -> None:
        """It went well."""


@pytest.fixture
def request_():
    request = StopRequest()
    with request.listening():
        yield request


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_process_acts_at_once(request_, number):
    agreement = Agreement(request_, SECONDS, lambda: True)
    assert agreement.decide() == Decision() and agreement.decide(save=True) == Decision(save=True)
    os.kill(os.getpid(), number)
    assert agreement.decide() == Decision(stop=True)
    assert request_.signal == number


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def _several(monkeypatch, request, seconds, all_alive):
    """An agreement of several processes, whose answers are those of this one and take `seconds`."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "new_group", lambda **named: "group")
    monkeypatch.setattr(dist, "all_reduce", lambda *arguments, **named: Work(seconds))
    monkeypatch.setattr(preemption, "AGREEMENT_TIMEOUT", 0.3)
    return Agreement(request, SECONDS, all_alive)


def test_several_processes_act_on_what_was_sent_one_boundary_before(request_, monkeypatch):
    agreement = _several(monkeypatch, request_, 0.0, lambda: True)
    assert agreement.decide(save=True) == Decision()
    assert agreement.decide(save=True) == Decision(save=True)  # asked once more while the first was under way
    assert agreement.decide() == Decision()
    os.kill(os.getpid(), signal.SIGTERM)
    assert agreement.decide() == Decision()
    assert agreement.decide() == Decision(stop=True)


def test_a_dead_peer_is_given_up_and_a_slow_one_is_waited_for(request_, monkeypatch):
    agreement = _several(monkeypatch, request_, 60.0, lambda: False)
    os.kill(os.getpid(), signal.SIGTERM)
    agreement.decide()
    began = time.monotonic()
    with pytest.raises(PeersLostError, match="told to stop by SIGTERM, but other processes did not answer"):
        agreement.decide()
    assert time.monotonic() - began < 30  # after 0.3 s, and not the answer's 60
    patient = _several(monkeypatch, request_, 1.0, lambda: True)
    patient.decide()
    assert patient.decide() == Decision(stop=True)
