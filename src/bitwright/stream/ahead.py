"""One step ahead: the next item is made by another thread while the present one is used."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items; at most one more than was asked for has been made. An error comes where its item would have."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        source = iter(items)
        coming = thread.submit(next, source, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, source, _END)
            yield item  # type: ignore[misc]
