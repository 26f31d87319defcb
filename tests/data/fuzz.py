"""Training rows of every format with seeded faults, as they occur in users' data files.

Each row has a description of its fault, and the outcome that follows from how it was made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

Row = dict[str, Any]

VALUE = "value"  # Case.outcome of a row that can be read, though it may be unusable
BLANK = "blank"

WORDS = (
    "kiln",
    '"mill"',
    "tank\tlow",
    "ore\nsteel",
    "3.5 %",
    "{x}",
    "a,b;",
    "naïve",
    "温度",
    "\\",
    "</s>",
    "it's",
)
UNUSUAL = {
    "emoji": "🔥👩‍🏭 done 🇩🇪",
    "right to left": "مرحبا \u202eabc\u202c שלום",
    "combining": "e\u0301 \u200b\u200d\ufeff zero width",
    "line separators": "one\u2028two\u2029three\x85four",
    "control characters": "bell \x07 null \x00 escape \x1b[31m",
    "lone surrogate": "half \ud83d a pair",
    "template tokens": "<|im_end|>\n<|im_start|>system\n{{ x }} [/INST]",
    "only spaces": " \t\n ",
    "empty": "",
}


@dataclass(frozen=True)
class Case:
    """One row of a file, without its line end.

    what: `good` or the fault. shape: a name of SHAPES. outcome: VALUE, BLANK or the reason of the RowError.
    """

    line: bytes
    what: str
    shape: str
    outcome: str


def malformed(seed: int, n: int, shapes: Sequence[str] = ()) -> list[Case]:
    """`n` lines of a JSONL file, of all shapes unless some are given; two in five, and the first, are good."""
    rng = Random(seed)
    faults = [*VALUE_FAULTS, *LINE_FAULTS]
    return [
        _case(
            rng, rng.choice(list(shapes or SHAPES)), "good" if i == 0 or rng.random() < 0.4 else rng.choice(faults)
        )
        for i in range(n)
    ]


def jsonl_bytes(cases: Iterable[Case]) -> bytes:
    """The file of these lines, the last one without a line end."""
    return b"\n".join(case.line for case in cases)


def malformed_records(seed: int, n: int) -> list[Case]:
    """`n` records of a CSV file with the columns of CSV_HEADER; some take several lines."""
    rng = Random(seed)
    kinds = ["good"] * len(RECORD_FAULTS) + list(RECORD_FAULTS)
    return [_record(rng, rng.choice(kinds)) for _ in range(n)]


def csv_bytes(cases: Iterable[Case], line_end: bytes = b"\r\n") -> bytes:
    """The file of CSV_HEADER and these records."""
    return line_end.join([CSV_HEADER, *(case.line for case in cases)]) + line_end


# Rows


def _text(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))


def _messages(rng: Random) -> Row:
    turns = [("user", _text(rng)), ("assistant", _text(rng))] * rng.randint(1, 3)
    if rng.random() < 0.3:
        turns.insert(0, ("system", _text(rng)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _sharegpt(rng: Random) -> Row:
    turns = [{"from": "human", "value": _text(rng)}, {"from": "gpt", "value": _text(rng)}]
    return {"conversations": turns * rng.randint(1, 3)}


SHAPES: dict[str, Callable[[Random], Row]] = {
    "messages": _messages,
    "prompt_completion": lambda rng: {"prompt": _text(rng), "completion": _text(rng)},
    "instruction": lambda rng: {"instruction": _text(rng), "input": _text(rng), "output": _text(rng)},
    "conversations": lambda rng: {"conversations": [{"input": _text(rng), "output": _text(rng)}]},
    "sharegpt": _sharegpt,
    "text": lambda rng: {"text": _text(rng)},
}


def _case(rng: Random, shape: str, what: str) -> Case:
    row = SHAPES[shape](rng)
    if what == "good":
        return Case(_dump(rng, row), what, shape, VALUE)
    if what in VALUE_FAULTS:
        return Case(_dump(rng, VALUE_FAULTS[what](rng, row)), what, shape, VALUE)
    outcome, fault = LINE_FAULTS[what]
    return Case(fault(rng, row), what, shape, outcome)


def _dump(rng: Random, value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


# Faults that leave a row JSON


def _places(value: Any) -> list[tuple[Any, Any]]:
    """`(container, key)` of every text in a row, the outermost first."""
    inside = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = [(value, key) for key, item in inside if isinstance(item, str)]
    return found + [place for _, item in inside if isinstance(item, (dict, list)) for place in _places(item)]


def _with_text(rng: Random, row: Row, text: object) -> Row:
    container, key = rng.choice(_places(row))
    container[key] = text
    return row


def _without_key(rng: Random, row: Row) -> Row:
    container, key = rng.choice(_places(row))
    del container[key]
    return row


def _reordered(rng: Random, row: Row) -> Row:
    key = next(iter(row))
    row[key] = row[key][::-1]  # of a text its characters, of a conversation its turns
    return row


def _other_role(rng: Random, row: Row) -> Row:
    roles = [(c, k) for c, k in _places(row) if k in ("role", "from")]
    container, key = rng.choice(roles or _places(row))
    container[key] = rng.choice(["tool", "Assistant", "bot", "", "user "])
    return row


VALUE_FAULTS: dict[str, Callable[[Random, Row], object]] = {
    "null field": lambda rng, row: _with_text(rng, row, None),
    "number for text": lambda rng, row: _with_text(rng, row, rng.choice([0, 1.5, True, -(2**70), 1e308])),
    "list for text": lambda rng, row: _with_text(rng, row, rng.choice([[], [None], {}, [{"type": "text"}]])),
    "missing key": _without_key,
    "unknown role": _other_role,
    "wrong order": _reordered,
    "empty container": lambda rng, row: dict.fromkeys(row, rng.choice([[], {}, ""])),
    "mixed shapes": lambda rng, row: row | rng.choice(list(SHAPES.values()))(rng),
    "extra keys": lambda rng, row: {"id": rng.random(), "": "", "tags": [1, [2, [3]]], **row},
    "no object": lambda rng, row: rng.choice([None, True, 17, -0.5, "text", [], [row]]),
    "empty object": lambda rng, row: {},
    "very long": lambda rng, row: _with_text(rng, row, _text(rng) * rng.randint(100, 500)),
    **{what: lambda rng, row, text=text: _with_text(rng, row, text) for what, text in UNUSUAL.items()},  # type: ignore[misc]
}


# Faults in the text of a line


def _ascii(row: Row) -> bytes:
    return json.dumps(row).encode()


def _with_field(row: Row, source: bytes) -> bytes:
    """The row with one more field, as JSON text."""
    return _ascii(row)[:-1] + b', "extra": ' + source + b"}"


def _twice(rng: Random, row: Row) -> bytes:
    key = json.dumps(rng.choice([*row])).encode()
    again = key + b": 1, " + key.replace(b"e", b"\\u0065") + b": 2}"  # the same key in another spelling
    return rng.choice([b"{" + again, _with_field(row, b"[{" + again + b"]")])


def _cut(rng: Random, row: Row) -> bytes:
    line = _ascii(row)
    return line[: rng.randrange(1, len(line))]


NOT_UTF8 = (b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf0\x9f\x94", b"\xe9t\xe9")
LINE_FAULTS: dict[str, tuple[str, Callable[[Random, Row], bytes]]] = {
    "empty line": (BLANK, lambda rng, row: b""),
    "white space": (BLANK, lambda rng, row: rng.choice([b" ", b"\t\t", b"\r", b"  \r"])),
    "CRLF": (VALUE, lambda rng, row: _ascii(row) + b"\r"),
    "lone CR": (VALUE, lambda rng, row: _ascii(row).replace(b": ", b":\r")),
    "indented": (VALUE, lambda rng, row: b" \t" + _ascii(row) + b"  "),
    "huge number": (VALUE, lambda rng, row: _with_field(row, b"-" + b"9" * rng.randint(3990, 6000))),
    "truncated": ("not_json", _cut),
    "single quotes": ("not_json", lambda rng, row: repr(row).encode()),
    "trailing comma": (VALUE, lambda rng, row: _ascii(row) + b","),
    "comma inside": ("not_json", lambda rng, row: _with_field(row, b"[1,]")),
    "two rows": ("not_json", lambda rng, row: _ascii(row) + b"\r" * rng.randint(0, 1) + _ascii(row)),
    "no JSON": ("not_json", lambda rng, row: rng.choice([b"prompt,completion", b"# remark", b"undefined", b"}"])),
    "no finite number": ("not_json", lambda rng, row: _with_field(row, rng.choice([b"NaN", b"[-Infinity]"]))),
    "raw control character": ("not_json", lambda rng, row: _with_field(row, b'"a\x01\tb"')),
    "raw NUL": ("not_json", lambda rng, row: rng.choice([b"\0" * 30, _with_field(row, b'"\0"')])),
    "other white space": (
        "not_json",
        lambda rng, row: rng.choice([b"\x0c", b"\x0b", b"\xc2\xa0", b"\xe2\x80\xa8"]),
    ),
    "byte order mark": ("not_json", lambda rng, row: b"\xef\xbb\xbf" + _ascii(row)),
    "UTF-16": ("not_json", lambda rng, row: _ascii(row).decode().encode("utf-16-le")),
    "open nesting": ("not_json", lambda rng, row: b"[" * rng.randint(20_000, 50_000)),
    "deep nesting": ("not_json", lambda rng, row: _with_field(row, b'{"a":' * 20_000 + b"1" + b"}" * 20_000)),
    "bad escape": (
        "not_json",
        lambda rng, row: _with_field(row, rng.choice([rb'"\x41"', rb'"\u12"', rb'"C:\d"'])),
    ),
    "duplicate key": ("duplicate_key", _twice),
    "invalid UTF-8": ("not_utf8", lambda rng, row: _with_field(row, b'"' + rng.choice(NOT_UTF8) + b'"')),
}


# CSV records

CSV_HEADER = b"prompt,completion"


def _field(rng: Random) -> bytes:
    return b'"' + _text(rng).replace('"', '""').encode() + b'"'


def _record(rng: Random, what: str) -> Case:
    if what == "good":
        return Case(_field(rng) + b"," + _field(rng), what, "prompt_completion", VALUE)
    outcome, fault = RECORD_FAULTS[what]
    return Case(fault(rng), what, "prompt_completion", outcome)


RECORD_FAULTS: dict[str, tuple[str, Callable[[Random], bytes]]] = {
    "empty line": (BLANK, lambda rng: b""),
    "white space": (BLANK, lambda rng: b"  "),
    "empty fields": (BLANK, lambda rng: rng.choice([b",", b'"",""', b'"",'])),
    "blank line in quotes": (VALUE, lambda rng: b'"a\r\n\r\n\nb",' + _field(rng)),
    "CR in quotes": (VALUE, lambda rng: b'"a\rb",' + _field(rng)),
    "quote in the middle": (VALUE, lambda rng: b'5" pipe,' + _field(rng)),
    "unusual text": (VALUE, lambda rng: "🔥\u2028 שלום,\ufeff\x85\x1b".encode()),
    "very long": (VALUE, lambda rng: b"a" * rng.randint(130_000, 140_000) + b",b"),  # over csv's own limit
    "too few fields": ("wrong_columns", lambda rng: _field(rng)),
    "too many fields": ("wrong_columns", lambda rng: b",".join([_field(rng)] * rng.randint(3, 5))),
    "text after quotes": ("not_csv", lambda rng: _field(rng) + b"x," + _field(rng)),
    "text after lines in quotes": ("not_csv", lambda rng: b'a,"b\r\nc\r\nd"e'),
    "lone CR": ("not_csv", lambda rng: b"a\rb," + _field(rng)),
    "NUL": ("not_csv", lambda rng: rng.choice([b"\0" * 20, b"a\0,b", b'"a\r\n\0",b'])),
    "invalid UTF-8": ("not_utf8", lambda rng: b"a" + rng.choice(NOT_UTF8) + b"," + _field(rng)),
    "invalid UTF-8 in quotes": ("not_utf8", lambda rng: b'"a\r\n' + rng.choice(NOT_UTF8) + b'\r\nb",c'),
}
