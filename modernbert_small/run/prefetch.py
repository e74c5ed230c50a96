"""Items that a thread makes ahead of the code that uses them."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """The same items in the same order, made in a thread that keeps up to `depth` of them ready.

    This saves time if making or using an item leaves Python: in a tokenizer, on a GPU, at the disk. An error from
    making an item is raised when that item would be given out.

    Args:
        items: iterated over in the thread alone.
        depth: number of items to make ahead, at least 1.
    """
    iterator, end = iter(items), object()  # `end` stands for the end of the items
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
