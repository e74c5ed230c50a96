"""Items made ahead: the same, in order, at most so many ready, errors in their turn."""

import threading

import pytest

from modernbert_small.run.prefetch import ahead


def test_the_items_in_order_made_elsewhere():
    threads = set()

    def items():
        for number in range(50):
            threads.add(threading.get_ident())
            yield number

    assert list(ahead(items(), 3)) == list(range(50))
    assert threading.get_ident() not in threads
    assert list(ahead([])) == []


def test_no_more_than_asked_for_are_ready():
    made = []
    stream = ahead((made.append(number) or number for number in range(50)), 2)
    for number in stream:
        assert len(made) <= number + 4
        if number == 10:
            break
    stream.close()
    assert len(made) < 20


def test_an_error_comes_in_its_turn():
    def items():
        yield 1
        raise ValueError("bad")

    stream = ahead(items(), 2)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="bad"):
        next(stream)
