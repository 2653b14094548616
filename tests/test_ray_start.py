"""SIGTERM while Ray starts: it must not get lost, and Ray must not answer it."""

from __future__ import annotations

import signal

import pytest

from mmcompress.search.ray_executor import _keep_signal_handler, ray_utils


@pytest.fixture()
def received():
    """What the handler of this process received."""
    numbers = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def answer_as_ray(number, frame):
    raise SystemExit(number)


def test_a_request_to_end_waits_until_ray_has_started(received):
    with _keep_signal_handler():
        ray_utils.set_sigterm_handler(answer_as_ray)
        signal.raise_signal(signal.SIGTERM)
        assert received == []
    assert received == [signal.SIGTERM]


def test_a_second_request_waits_for_nothing(received):
    with _keep_signal_handler():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]


def test_without_a_request_all_is_as_before(received):
    handler = signal.getsignal(signal.SIGTERM)
    set_handler = ray_utils.set_sigterm_handler
    with pytest.raises(ValueError, match="no Ray"), _keep_signal_handler():
        raise ValueError("no Ray")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert ray_utils.set_sigterm_handler is set_handler
    assert received == []
