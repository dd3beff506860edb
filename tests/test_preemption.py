"""What ranks agree on at a step boundary, and what they do when one of them does not answer.

pytest tests/test_preemption.py
"""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

from utils import distributed
from utils.faults import preemption, watchdog
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
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


def test_a_closed_terminal_saves_like_sigterm_unless_it_is_ignored():
    with StopRequest().listening() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest().listening() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request
    finally:
        signal.signal(signal.SIGHUP, before)


# ---------------------------------------------------------------------------------------------------------------------
# Who is named
# ---------------------------------------------------------------------------------------------------------------------


def test_a_rank_that_hung_before_its_first_sign_is_named_with_host_and_last_step(monkeypatch):
    """Rank 0 has the store, which hangs with it: only what was known before and what this rank has done can tell."""
    known = [watchdog.Sign(0, 0, "start", f"host{rank}", 7, 0) for rank in (0, 1)]
    peers = watchdog._Peers(HashStore(), lambda tick: watchdog.Sign(90, 4, "backward pass", "host1", 8, tick), known)
    # this rank waits in its fifth step: the exchange of the fourth was with all
    assert peers.describe([0]) == "rank 0 on host host0, last seen in the exchange of gradients of step 4"
    peers.signs[0] = watchdog.Sign(91, 4, "update", "host0", 7, 1)
    assert peers.describe([0]) == "rank 0 on host host0, last seen in update of step 5"
    peers.signs[0] = watchdog.Sign(40, 2, "update", "host0", 7, 1)  # a sign of a second ago
    assert peers.describe([0, 1]).startswith("rank 0 on host host0, last seen in the exchange of gradients of step 4, ")


def test_signs_are_exchanged_before_anyone_can_hang(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: HashStore())
    monkeypatch.setattr(HashStore, "clone", lambda self: self, raising=False)
    others = watchdog.Sign(0, 0, "start", "elsewhere", 5, 0)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [others, mine])
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    dog = watchdog.Watchdog(600)
    with dog.watching():
        dog.beat(2, "forward pass")
        said = dog._peers.describe([0])
    assert said == "rank 0 on host elsewhere, last seen in the exchange of gradients of step 2"
