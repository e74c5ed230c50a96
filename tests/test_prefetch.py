"""Items made ahead are the same in the same order; only so many are ready; errors come in their turn."""

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
    depth, made = 2, []

    def items():
        for number in range(50):
            made.append(number)
            yield number

    stream = ahead(items(), depth)
    for number in range(10):
        assert next(stream) == number
        assert len(made) <= number + 1 + depth
    stream.close()
    assert len(made) <= 10 + depth


def test_an_error_comes_in_its_turn():
    def items():
        yield 1
        raise ValueError("bad")

    stream = ahead(items(), 2)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="bad"):
        next(stream)
