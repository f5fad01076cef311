"""The identity of a checkpoint, taken without reading all of it: enough to notice that a model was exchanged."""

import hashlib
from datetime import UTC, datetime

from bitwright.checkpoint.header import Header
from bitwright.checkpoint.ranges import read_into

SAMPLE_BYTES = 64 * 1024


def of_small_file(raw: bytes) -> str:
    """The sha256 of a file that is read whole."""
    return f"sha256 {hashlib.sha256(raw).hexdigest()}"


def of_weights(header: Header) -> str:
    """Size, sha256 of the header's bytes, and sha256 of 64 KiB from the start, middle and end of the data."""
    data_bytes = header.size - header.data_start
    length = min(SAMPLE_BYTES, data_bytes)
    starts = (header.data_start, header.data_start + (data_bytes - length) // 2, header.size - length)
    of_header = hashlib.sha256(_bytes(header, 0, header.data_start))
    of_samples = hashlib.sha256(b"".join(_bytes(header, start, length) for start in starts))
    return f"{header.size} bytes, header sha256 {of_header.hexdigest()}, samples sha256 {of_samples.hexdigest()}"


def of_time(header: Header) -> str:
    """When the file was last written to, to the nanosecond, UTC."""
    seconds, rest = divmod(header.mtime_ns, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d}"


def _bytes(header: Header, start: int, length: int) -> bytearray:
    """`length` bytes of the file from `start` on."""
    found = bytearray(length)
    read_into(header, start, memoryview(found))
    return found
