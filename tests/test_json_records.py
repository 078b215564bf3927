"""Rows of JSON files: what the file says, by index, in little memory."""

import bz2
import gzip
import json
import lzma
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from torchtune_vl.datasets._json_records import JsonRecords

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_infinity=False, allow_nan=False)
    | st.text()
    | st.sampled_from(
        ['"', "\\", '\\"', "],", "}{", "[\n", "\u2028", "\x85", "\ud83d", "007", "\t\r"]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=5)
WRITERS: dict[str, Callable[..., str]] = {
    "array": lambda rows, **how: json.dumps(rows, **how),
    "pretty array": lambda rows, **how: json.dumps(rows, indent=2, **how),
    "lines": lambda rows, **how: "\n".join(json.dumps(row, **how) for row in rows),
    "CRLF": lambda rows, **how: "".join(json.dumps(row, **how) + "\r\n" for row in rows),
    "blank lines": lambda rows, **how: (
        "\n \n" + "\n\n\t\n".join(json.dumps(r, **how) for r in rows)
    ),
    "pretty array, CRLF": lambda rows, **how: json.dumps(rows, indent=1, **how).replace(
        "\n", "\r\n"
    ),
    "line breaks at brackets": lambda rows, **how: (
        "[\n" + "\n,\n".join(json.dumps(r, **how) for r in rows) + "\n]\n\n"
    ),
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def rows_of(path: Path, **settings: Any) -> list[Any]:
    return [record for record, _ in JsonRecords([str(path)], **settings)]


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit and in the order of keys."""
    return json.dumps(a) == json.dumps(b)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@settings(max_examples=25, deadline=None, suppress_health_check=[*HealthCheck])
@given(rows=st.lists(OBJECTS, min_size=1, max_size=6), is_ascii=st.booleans())
def test_rows_come_back_exactly(
    tmp_path: Path, writer: str, mark: bytes, rows: list[Any], is_ascii: bool
) -> None:
    text = WRITERS[writer](rows, ensure_ascii=is_ascii)
    try:
        content = mark + text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can hold
        content = mark + WRITERS[writer](rows).encode("utf-8")
    read = JsonRecords([str(write(tmp_path / "x.json", content))])
    assert len(read) == len(rows)
    assert same([record for record, _ in read], rows)
    assert same([read[i][0] for i in reversed(range(len(rows)))], rows[::-1])


@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
@given(rows=st.lists(OBJECTS, min_size=1, max_size=5), data=st.data())
def test_damage_never_passes_for_other_rows(
    tmp_path: Path, rows: list[Any], data: st.DataObject
) -> None:
    """Of a file with one byte less either the same rows come as of the whole, or an error."""
    writer = data.draw(st.sampled_from(sorted(WRITERS)))
    content = WRITERS[writer](rows).encode()
    place = data.draw(st.integers(0, len(content) - 1))
    path = write(tmp_path / "x.json", content[:place] + content[place + 1 :])
    try:
        read = JsonRecords([str(path)])
    except ValueError:
        return
    good = 0
    for row in range(len(read)):
        try:
            value, _ = read[row]
        except ValueError:
            continue
        good += any(same(value, other) for other in rows)
    # A byte within a string or number changes one row, one between rows joins two
    assert good >= len(rows) - 2 or writer not in ("lines", "CRLF", "blank lines")


def test_numbers_are_exact(tmp_path: Path) -> None:
    numbers = ["9007199254740993", "123456789012345678901234567890", "-0.0", "1e-320", "1.0", "1"]
    path = write(tmp_path / "x.jsonl", "\n".join(f'{{"n": {n}}}' for n in numbers))
    read = [row["n"] for row in rows_of(path)]
    expected = [json.loads(n) for n in numbers]
    assert list(map(repr, read)) == list(map(repr, expected))
    (row,) = rows_of(write(path, '{"unused": NaN}'))  # as Python and pandas write it
    assert math.isnan(row["unused"])


ERRORS = {
    "cut line": (b'{"a": 1}\n{"a": {"b": "x\n{"a": 3}', 1, r"line 2, column 13: this is no JSON"),
    "cut line, CRLF": (b'{"a": 1}\r\n{"a": \r\n{"a": 3}', 1, r"line 2, column 6: this is no JSON"),
    "behind letters": ('{"a": 1}\n{"äöü": x}'.encode(), 1, r"line 2, column 9: this is no JSON"),
    "two in a line": (b'{"a": 1}\n{"a": 1} {"b": 2}', 1, r"line 2, column 10: .*Extra data"),
    "Latin-1": ('{"a": 1}\n{"a": "ü"}'.encode("latin-1"), 1, r"line 2, column 8: the byte 0xfc"),
    "key twice": (b'{"a": 1}\n{"b": {"image": 1, "image": 2}}', 1, r"line 2.* key 'image' twice"),
    "too large": (b'{"a": 1e999}', 0, r"line 1.*1e999 is too large"),
    "too deep": (b'{"a": 1}\n' + b"[" * 100_000, 1, r"line 2: .*nested too deeply"),
    "twice in an array": (b'[{"a": 1},\n{"b": 2, "b": 3}]', 1, r"line 2: .*the key 'b' twice"),
    "too many digits": (b'{"a": ' + b"1" * 10_000 + b"}", 0, r"line 1.*digits"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_a_row(tmp_path: Path, name: str) -> None:
    content, bad, message = ERRORS[name]
    path = write(tmp_path / "x.json", content)
    rows = JsonRecords([str(path)])
    assert bad < len(rows)
    for index in range(len(rows)):
        if index == bad:
            with pytest.raises(ValueError, match=f"^{path}, {message}"):
                rows[index]
        else:
            assert isinstance(rows[index][0], dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no records"),
        (b" \n\n", "has no records"),
        (b"[]", "has no records"),
        (b'[{"a": 1},\n{"a": 2', r"line 2, column 8: this is no JSON"),
        (b'[{"a": 1},\n{"a": "x}]', r"line 2, column 7: this is no JSON"),
        (b'[{"a": 1},\n{"a": 2},', r"line 2, column 10: this is no JSON"),
        (b'[{"a": 1}}', "line 1, column 10: this is no JSON"),
        (b'[\n{"a": 1}]\n{"b": 2}', r"line 3, column 1: .*Extra data"),
        (b'[{"a": 1},\n {"b": 2},\n]', r"line 3, column 1: .*Expecting value"),
        (b'[{"a": 1}\n,{"b": 2} {"c": 3}]', r"line 2, column 11: .*Expecting ',' delimiter"),
        (b'[\n  {"a": 1},\n  {"b": 2x}]', r"line 3, column 10: .*Expecting ','"),
        ('[\n{"ä": 1},\n {"ä": "ü'.encode() + b'\xfc"}]', "line 3, column 10: the byte 0xfc"),
        (b"[" * 100_000 + b"]" * 100_000, "line 1: .*nested too deeply"),
        (b'{"a": \n{"b": 1}', "line 2, column 9: this is no JSON"),
        (b'{"a": 1} {"b": 2}\n{"c": 3}', "line 1, column 10: .*Extra data"),
        (b"id,text\n1,x", "line 1, column 1: this is no JSON"),
        ('[{"a": 1}]'.encode("utf-16"), "line 1, column 1: the byte 0xff is no UTF-8: save"),
        ('{"a": 1}\n{}'.encode("utf-16-le"), "line 1, column 2: this is no JSON"),
        (b"PK\x03\x04rest", "line 1, column 1: this is no JSON"),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-9], "cannot be unpacked"),
    ],
)
def test_errors_of_a_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "x.json", content)
    with pytest.raises(ValueError, match=rf"^{path}.*{message}"):
        JsonRecords([str(path)], cache_dir=str(tmp_path / "cache"))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "is no file"), ("", "is no file"), ("x", "No such file")):
        with pytest.raises(ValueError, match=message):
            JsonRecords([str(tmp_path / name)])


def test_files_of_every_shape_together(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.json", '[{"a": 1}, {"a": [1]}]'),
        write(tmp_path / "b.jsonl", '{"b": "1"}\n[2]\n'),
        write(tmp_path / "c.json", '{\n "a": {"x": 1}\n}\n'),
        write(tmp_path / "d.jsonl", "[1]\n[2, 3]\n"),
    ]
    rows = JsonRecords(list(map(str, files)))
    expected = [{"a": 1}, {"a": [1]}, {"b": "1"}, [2], {"a": {"x": 1}}, [1], [2, 3]]
    places = [(0, 1), (0, 1), (1, 1), (1, 2), (2, 1), (3, 1), (3, 2)]
    assert list(rows) == [
        (record, f"{files[file]}, line {line}")
        for record, (file, line) in zip(expected, places, strict=True)
    ]
    with pytest.raises(IndexError):
        rows[7]


def test_rows_under_a_key(tmp_path: Path) -> None:
    nested = (
        '{"info": {"data": [0], "x": "]"},\n "d\\u0061ta" :\n [{"a": 1},\n {"a": "}"}], "n": 2}'
    )
    path = write(tmp_path / "x.json", nested)
    assert rows_of(path, field="data") == [{"a": 1}, {"a": "}"}]
    assert JsonRecords([str(path)], "data")[1] == ({"a": "}"}, f"{path}, line 4")
    for field in ("n", "info", "none"):
        with pytest.raises(
            ValueError, match=rf"no object that has a list of records under '{field}'"
        ):
            rows_of(path, field=field)
    for content, message in (
        ('{"data": [{}], "data": []}', "no object that has a list of records"),
        ('[{"data": [{}]}]', "no object that has a list of records"),
        ('{"data": [{}]}\n{"data": []}', "line 2, column 1: this is no JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            rows_of(write(path, content), field="data")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path, cache = tmp_path / "x.jsonl", str(tmp_path / "cache")
    for content in (b'{"a": 1}\n{"a": 2}', b'{"a": 3}\n{"a": 2}'):
        write(path, compress(content))
        assert rows_of(path, cache_dir=cache) == [*map(json.loads, content.splitlines())]
    with pytest.raises(ValueError, match=f"^{path}, line 1"):
        rows_of(write(path, compress(b'{"a": 1')), cache_dir=cache)


def test_a_file_that_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n{"a": 2}')
    rows = JsonRecords([str(path)])
    assert rows[0] == ({"a": 1}, f"{path}, line 1")
    path.write_text('{"a": 1}\n{"b": 22}')
    with pytest.raises(ValueError, match=f"^{path} has changed"):
        rows[1]
    path.unlink()
    with pytest.raises(OSError, match=f"No such file .*{path}"):  # a dataset makes it a ValueError
        rows[1]


def test_data_workers_share_places_alone(tmp_path: Path) -> None:
    expected = [{"number": number, "text": "x" * 1000} for number in range(3000)]
    rows = JsonRecords([str(write(tmp_path / "x.json", json.dumps(expected)))])
    pickled = pickle.dumps(rows)  # as spawned workers get it
    assert len(pickled) < 25 * len(expected)
    assert [record for record, _ in pickle.loads(pickled)] == expected
    loader: Any = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=500,
        num_workers=2,
        collate_fn=list,
    )
    assert [row for batch in loader for row, _ in batch] == expected
