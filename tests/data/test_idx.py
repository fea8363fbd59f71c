import struct

import pytest

from nin.data.decoding import ImageError
from nin.data.idx import parse_idx


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack(">4I", 0x0803, 2, 1, 3) + bytes(5), r"declares 6 values of \(2, 1, 3\), the file holds 5"),
        (struct.pack(">2I", 0x0803, 2), "not an IDX file"),
        (b"\x00\x00\x0d\x03" + bytes(40), "not an IDX file"),
    ],
)
def test_a_damaged_idx_file_is_named(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        parse_idx(content)
