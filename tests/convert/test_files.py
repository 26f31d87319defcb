"""`make convert`: multi-line JSON and ChatGPT exports become JSONL, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from src.convert.chatgpt import chatgpt_conversations
from src.convert.files import ConversionResult, convert_file, convert_tree, exit_code
from src.convert.json_text import one_line, read_json_values

ROOT = Path(__file__).resolve().parents[2]
EXPORT = Path(__file__).with_name("chatgpt_export.json")
PRETTY = '{\n  "a": 1,\n  "b": ["x", {"c": null}]\n}\n{\n  "a": 2\n}\n'
PRETTY_ROWS = '{"a": 1, "b": ["x", {"c": null}]}\n{"a": 2}\n'


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def refused(folder: Path, content: str | bytes, name: str = "x.json") -> str:
    """Convert `content`, make sure that nothing was written, and return the report."""
    path = put(folder, name, content)
    before = snapshot(folder)
    outcome = convert_file(path)
    assert outcome.status == "refused"
    assert snapshot(folder) == before
    return str(outcome).replace(f"{folder}/", "")


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "convert_data.py"), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


# --- .jsonl in place -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b'{"a":1}\n{"b":   2.50}\n',
        b'{"a":1}\r\n\r\n{"b":2}',
        b'\xef\xbb\xbf{"a":1}\n',
        b'  {"a": "\xe2\x80\xa8 one \xc2\x85 line"}\n\t\n{"b": "\\ud800"}\n',
    ],
)
def test_valid_jsonl_is_left_untouched(tmp_path: Path, content: bytes) -> None:
    path = put(tmp_path, "x.jsonl", content)
    os.utime(path, ns=(1, 1))
    before = snapshot(tmp_path)
    outcome = convert_file(path)
    assert outcome.status == "ok"
    assert f"ok ({outcome.rows} row" in str(outcome)
    assert outcome.rows == content.count(b'":')
    assert ("byte order mark" in str(outcome)) == content.startswith(b"\xef\xbb\xbf")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [
        PRETTY,
        "[\n" + PRETTY.replace("}\n{", "},\n{") + "]",
        "\ufeff" + PRETTY.replace("\n", "\r\n"),
        PRETTY.replace("\n", " "),
        PRETTY.replace("\n", "\r"),
        '[\n{"a": 1, "b": ["x", {"c": null}]}\n,\n{"a": 2}\n]\n',
    ],
)
def test_multi_line_jsonl_is_rewritten_and_the_original_kept(tmp_path: Path, content: str) -> None:
    path = put(tmp_path, "x.jsonl", content)
    path.chmod(0o640)
    outcome = convert_file(path)
    assert (outcome.status, outcome.rows) == ("converted", 2)
    assert str(outcome) == f"{path}: converted (2 rows), original kept as {path}.orig"
    assert path.read_text() == PRETTY_ROWS
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert Path(f"{path}.orig").read_bytes() == content.encode()
    assert sorted(os.listdir(tmp_path)) == ["x.jsonl", "x.jsonl.orig"]


def test_an_existing_orig_is_never_overwritten(tmp_path: Path) -> None:
    for name in ("x.jsonl.orig", "x.jsonl.orig.2"):
        put(tmp_path, name, name)
    outcome = convert_file(put(tmp_path, "x.jsonl", PRETTY))
    assert str(outcome).endswith("x.jsonl.orig.3")
    assert (tmp_path / "x.jsonl.orig").read_text() == "x.jsonl.orig"
    assert (tmp_path / "x.jsonl.orig.2").read_text() == "x.jsonl.orig.2"
    assert (tmp_path / "x.jsonl.orig.3").read_text() == PRETTY


def test_original_is_copied_if_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    put(tmp_path, "x.jsonl.orig", "mine")
    path = put(tmp_path, "x.jsonl", PRETTY)
    assert convert_file(path).status == "converted"
    assert (tmp_path / "x.jsonl.orig").read_text() == "mine"
    assert (tmp_path / "x.jsonl.orig.2").read_text() == PRETTY
    assert path.read_text() == PRETTY_ROWS


def test_a_full_disk_leaves_the_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = put(tmp_path, "x.jsonl", PRETTY)
    monkeypatch.setattr(os, "fsync", full)
    outcome = convert_file(path)
    assert outcome.status == "refused"
    assert "No space left on device" in str(outcome)
    assert os.listdir(tmp_path) == ["x.jsonl"]
    assert path.read_text() == PRETTY


# --- .json beside ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('[{"a": 1}, {"a": 2}]', ['{"a": 1}', '{"a": 2}']),
        (PRETTY, PRETTY_ROWS.splitlines()),
        ('{\n"single": true\n}', ['{"single": true}']),
        ('{"single": true}', ['{"single": true}']),
    ],
)
def test_json_is_written_beside_and_stays(tmp_path: Path, content: str, rows: list[str]) -> None:
    path = put(tmp_path, "x.json", content)
    outcome = convert_file(path)
    target = tmp_path / "x.jsonl"
    assert (outcome.status, outcome.rows) == ("converted", len(rows))
    assert target.read_text() == "".join(row + "\n" for row in rows)
    assert path.read_text() == content
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(path.stat().st_mode)


def test_an_existing_target_is_up_to_date_refused_or_forced(tmp_path: Path) -> None:
    path = put(tmp_path, "x.json", PRETTY)
    target = put(tmp_path, "x.jsonl", PRETTY_ROWS)
    before = snapshot(tmp_path)
    assert str(convert_file(path)) == f"{path}: up to date (2 rows in {target})"
    assert str(convert_file(path, force=True)).startswith(f"{path}: up to date")
    assert snapshot(tmp_path) == before

    target.write_text('{"mine": 1}\n')
    target.chmod(0o600)
    before = snapshot(tmp_path)
    outcome = convert_file(path)
    assert outcome.status == "refused"
    assert str(target) in str(outcome)
    assert "--force" in str(outcome)
    assert "away" in str(outcome)
    assert snapshot(tmp_path) == before

    assert convert_file(path, force=True).status == "converted"
    assert target.read_text() == PRETTY_ROWS
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert (tmp_path / "x.jsonl.orig").read_text() == '{"mine": 1}\n'


def test_a_target_that_is_a_link_is_not_replaced(tmp_path: Path) -> None:
    elsewhere = put(tmp_path, "elsewhere/rows", '{"mine": 1}\n')
    path = put(tmp_path, "x.json", PRETTY)
    (tmp_path / "x.jsonl").symlink_to(elsewhere)
    assert convert_file(path, force=True).status == "refused"
    assert (tmp_path / "x.jsonl").is_symlink()
    assert elsewhere.read_text() == '{"mine": 1}\n'


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "report"),
    [
        ('[\n  {"a": 1}\n  {"a": 2}]', "x.json:3:3: Expecting ',' delimiter."),
        ('{\n "a": 1\n "b": 2\n}', "x.json:3:2: Expecting ',' delimiter."),
        ('{"a": 1}\n{"a":', "x.json:2:6: Expecting value."),
        ('[{"a": 1}', "x.json:1:10: Expecting ',' delimiter."),
        ('[{"a": 1}]\n[]', "x.json:2:1: Extra data after the array."),
        ('{"a": 1},\n{"a": 2}', "x.json:1:9: Expecting value."),
        ('{"a": "two\nlines"}', "x.json:1:11: Invalid control character at."),
        ('{"a": 1}\n\n7\n', "x.json:3: a number where an object is needed."),
        ("1.5", "x.json:1: a number where an object is needed."),
        ('"text"', "x.json:1: a string where"),
        ("{}\ntrue", "x.json:2: true or false where"),
        ("[{},\n null]", "x.json:2: null where"),
        ("[\n[{}]]", "x.json:2: an array where"),
        ("[1]\n[2]", "x.json:2:1: Extra data after the array."),
        (
            '{"a": 1}\n{"a": [\n  0, NaN]}',
            "x.json:3:6: the value is not JSON: it has the number NaN, which JSON does not allow.",
        ),
        (
            '{"NaN": "NaN",\n "a": -Infinity}',
            "x.json:2:7: the value is not JSON: it has the number -Infinity, which JSON does not allow.",
        ),
        ('[{"a": {"k": 1}, "k": 2,\n "\\u006b": 3}]', 'x.json:2:2: the value has the key "k" twice.'),
        ("", "x.json: the file is empty."),
        ("\ufeff \r\n\n", "x.json: the file is empty."),
        ("[ ]", "x.json:1: the array is empty."),
        (b'{"a":\n "caf\xe9"}', "x.json:2: byte 0xe9 is not UTF-8 text."),
        ("[" * 200_000, "x.json:1:2: Nested too deeply."),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_broken_files_are_named_with_the_place(
    tmp_path: Path, content: str | bytes, report: str, suffix: str
) -> None:
    said = refused(tmp_path, content, f"x{suffix}")
    assert said.startswith(report.replace(".json", suffix))
    assert len(said) > len(report) + 10, "a remedy follows"


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl.orig"])
def test_other_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path, "{}", name) == f"{name}: not a .json or .jsonl file. Rename it if it holds JSON."


def test_missing_and_special_paths_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    outcomes = convert_tree([tmp_path / "no.json", tmp_path / "nowhere", tmp_path / "loop.json", tmp_path])
    details = {outcome.path.name: (outcome.status, outcome.detail) for outcome in outcomes}
    assert details["no.json"][1].startswith(": No such file or directory.")
    assert details["nowhere"][1].startswith(": No such file or directory.")
    assert details["pipe.json"][1].startswith(": not a regular file.")
    assert details["loop.json"][0] in ("refused", "skipped")
    assert exit_code(outcomes) == 2


# --- rows keep their content -----------------------------------------------------------------------------


def test_numbers_keep_their_text(tmp_path: Path) -> None:
    digits = "9" * 5000
    source = '{"a":[1.10,1e400,-0,0.1000000000000000055511151231257827,1E+2,12345678901234567890],"big":%s}'
    path = put(tmp_path, "x.json", "[" + source % digits + "]")
    assert convert_file(path).status == "converted"
    expected = (source % digits).replace(",", ", ").replace(":", ": ") + "\n"
    assert (tmp_path / "x.jsonl").read_text() == expected


@pytest.mark.parametrize(
    "value",
    [
        {"s": 'quote " backslash \\ slash / , : [ { \u2028 \x7f \t é 😀', "e": "", "": {}},
        {"l": [], "n": [None, True, False, 0, -1, 2.5, [[{"deep": [1]}]]]},
    ],
)
def test_rows_are_laid_out_as_json_dumps_does(value: object) -> None:
    expected = json.dumps(value, ensure_ascii=False)
    for source in (json.dumps(value, indent=3), json.dumps(value, separators=(",", ":")), expected):
        assert one_line(source) == expected


def test_lone_surrogates_are_escaped_and_others_are_not(tmp_path: Path) -> None:
    path = put(tmp_path, "x.json", '[{"a": "é \\ud83d\\ude00"}, {"a": "é \\ud83d"}]')
    assert convert_file(path).status == "converted"
    rows = (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    assert rows == '{"a": "é 😀"}\n{"a": "\\u00e9 \\ud83d"}\n'


def test_values_come_with_their_lines() -> None:
    values = list(read_json_values('\n{"a":\n1}\n\n{"b": 2} {"c": 3}'))
    assert [(value.line, value.value) for value in values] == [(2, {"a": 1}), (5, {"b": 2}), (5, {"c": 3})]


# --- folders ---------------------------------------------------------------------------------------------


def test_folders_are_searched_and_one_bad_file_stops_no_other(tmp_path: Path) -> None:
    put(tmp_path, "README.md", "{")
    put(tmp_path, "old.jsonl.orig", "{")
    put(tmp_path, ".hidden/x.json", "{")
    put(tmp_path, "._x.json", b"\x00\xff")
    put(tmp_path, "a_bad.json", "{")
    put(tmp_path, "eval/deep/q.json", PRETTY)
    put(tmp_path, "train.jsonl", PRETTY)
    outcomes = convert_tree([tmp_path, tmp_path / "train.jsonl"])
    found = {str(outcome.path.relative_to(tmp_path)): outcome.status for outcome in outcomes}
    assert found == {"a_bad.json": "refused", "eval/deep/q.json": "converted", "train.jsonl": "converted"}
    assert (tmp_path / "eval/deep/q.jsonl").read_text() == PRETTY_ROWS
    assert not (tmp_path / "a_bad.jsonl").exists()
    assert exit_code(outcomes) == 2


def test_links_in_folders_are_named_but_not_followed(tmp_path: Path) -> None:
    outside = put(tmp_path, "outside/far.jsonl", PRETTY)
    real = put(tmp_path, "data/real.jsonl", PRETTY)
    for name, target in [("a.jsonl", outside), ("folder", outside.parent), ("z.jsonl", real)]:
        (tmp_path / "data" / name).symlink_to(target)
    outcomes = convert_tree([tmp_path / "data"])
    assert [(outcome.path.name, outcome.status) for outcome in outcomes] == [
        ("a.jsonl", "skipped"),
        ("folder", "skipped"),
        ("real.jsonl", "converted"),
        ("z.jsonl", "skipped"),
    ]
    assert outside.read_text() == PRETTY
    assert exit_code(outcomes) == 0


def test_a_link_given_by_name_is_followed(tmp_path: Path) -> None:
    real = put(tmp_path, "real/x.jsonl", PRETTY)
    (tmp_path / "x.jsonl").symlink_to(real)
    assert convert_file(tmp_path / "x.jsonl").status == "converted"
    assert (tmp_path / "x.jsonl").is_symlink()
    assert real.read_text() == PRETTY_ROWS


def test_converting_twice_changes_no_byte(tmp_path: Path) -> None:
    put(tmp_path, "a.json", PRETTY)
    put(tmp_path, "b.jsonl", "[" + PRETTY.replace("}\n{", "},\n{") + "]")
    put(tmp_path, "c.jsonl", '{"a":1}\n')
    put(tmp_path, "both.json", PRETTY)
    put(tmp_path, "both.jsonl", PRETTY)
    put(tmp_path, "eval/e.json", '{"a": "\\ud800", "n": 1.10}')
    shutil.copy(EXPORT, tmp_path / "conversations.json")
    shutil.copy(EXPORT, tmp_path / "chats.jsonl")
    assert exit_code(convert_tree([tmp_path])) == 0
    before = snapshot(tmp_path)
    again = convert_tree([tmp_path])
    assert len(again) == 11
    assert {outcome.status for outcome in again} == {"ok", "up to date"}
    assert snapshot(tmp_path) == before


def test_check_writes_nothing(tmp_path: Path) -> None:
    put(tmp_path, "a.json", PRETTY)
    put(tmp_path, "b.jsonl", PRETTY)
    put(tmp_path, "c.jsonl", "{}\n")
    before = snapshot(tmp_path)
    outcomes = convert_tree([tmp_path], check=True)
    assert [outcome.status for outcome in outcomes] == ["would convert", "would convert", "ok"]
    assert snapshot(tmp_path) == before
    assert exit_code(outcomes) == 1


# --- ChatGPT exports -------------------------------------------------------------------------------------


def chat(*nodes: tuple[str, str | None, str | None, str], title: str = "T") -> dict[str, Any]:
    """A conversation of (id, parent, role, text) nodes; a node without role carries no message."""
    mapping: dict[str, Any] = {}
    for node_id, parent, role, text in nodes:
        content = {"content_type": "text", "parts": [text]}
        message = {"author": {"role": role}, "content": content, "recipient": "all"} if role else None
        children = [other for other, its_parent, *_ in nodes if its_parent == node_id]
        mapping[node_id] = {"id": node_id, "parent": parent, "children": children, "message": message}
    return {"title": title, "mapping": mapping, "current_node": nodes[-1][0] if nodes else None}


def texts(*conversations: object) -> list[list[str]]:
    rows = chatgpt_conversations(conversations).rows
    return [[f"{message['role'][0]}:{message['content']}" for message in row] for row in rows]


def with_content(role: str, content: object, **fields: object) -> dict[str, Any]:
    """A question, the message to look at in between, and an answer."""
    message = {"author": {"role": role}, "content": content, **fields}
    conversation = chat(("q", None, "user", "Q"), ("x", "q", None, ""), ("a", "x", "assistant", "A"))
    conversation["mapping"]["x"]["message"] = message
    return conversation


def test_every_branch_of_the_export_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "any name.json"
    shutil.copy(EXPORT, path)
    outcome = convert_file(path)
    rows = [json.loads(line) for line in (tmp_path / "any name.jsonl").read_text().splitlines()]
    how_long, rye = "How long does bread dough rise?", "How long does rye dough rise?"
    measured = "It measured 97 °C inside.\n\nSo yes, it is done."
    assert [[(m["role"], m["content"]) for m in row["messages"]] for row in rows] == [
        [("user", how_long), ("assistant", "Until it has doubled.")],
        [("user", rye), ("assistant", "Two to three hours.")],
        [
            ("user", how_long),
            ("assistant", "About an hour at 24 °C."),
            ("user", "Is this loaf baked through?"),
            ("assistant", measured),
        ],
    ]
    assert all(list(row) == ["messages"] for row in rows)
    assert outcome.detail.splitlines() == [
        f": converted (3 rows) to {tmp_path}/any name.jsonl; left out: 3 unanswered user messages, 2 images, "
        "2 thoughts, 2 unprompted answers, 1 custom instruction, 1 duplicate branch, 1 empty message, "
        "1 hidden message, 1 tool call, 1 tool message",
        '  no row from "Only a picture": no visible text from the user',
        '  no row from "No answer yet": no visible text from the assistant',
    ]


def test_a_single_conversation_object_and_a_jsonl_of_them_are_recognised(tmp_path: Path) -> None:
    conversation = chat(("q", None, "user", "Q"), ("a", "q", "assistant", "A"))
    row = '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}\n'
    convert_file(put(tmp_path, "one.json", json.dumps(conversation, indent=2)))
    convert_file(put(tmp_path, "lines.jsonl", json.dumps(conversation) + "\n"))
    assert (tmp_path / "one.jsonl").read_text() == row
    assert (tmp_path / "lines.jsonl").read_text() == row
    assert (tmp_path / "lines.jsonl.orig").exists()


def test_an_object_that_only_has_a_mapping_is_no_conversation(tmp_path: Path) -> None:
    convert_file(put(tmp_path, "x.json", '[{"mapping": {"a": {"b": 1}}, "text": "t"}]'))
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"mapping": {"a": {"b": 1}}, "text": "t"}


def test_conversations_mixed_with_other_objects_are_refused(tmp_path: Path) -> None:
    conversation = json.dumps(chat(("q", None, "user", "Q")))
    said = refused(tmp_path, f'[{conversation},\n{{"text": "other"}}]')
    assert said.startswith("x.json:2: this object is not a ChatGPT conversation")


def test_an_export_without_any_answer_is_refused_with_titles(tmp_path: Path) -> None:
    nothing = {"title": "Nothing", "mapping": {}}
    only_answers = chat(("a", None, "assistant", "A"), title="Greeting")
    other_way = chat(("a", None, "assistant", "A"), ("q", "a", "user", "Q"), title=" ")
    said = refused(tmp_path, json.dumps([chat(("q", None, "user", "Q")), nothing, only_answers, other_way]))
    assert said.splitlines() == [
        "x.json: no conversation has a question and an answer. Nothing was written; left out: "
        "2 unanswered user messages, 2 unprompted answers",
        '  no row from "T": no visible text from the assistant',
        '  no row from "Nothing": it has no messages',
        '  no row from "Greeting": no visible text from the user',
        '  no row from "(untitled)": no user message is followed by an answer',
    ]


@pytest.mark.parametrize(
    ("role", "content", "fields", "kind"),
    [
        ("tool", {"content_type": "text", "parts": ["x"]}, {}, "tool message"),
        ("assistant", {"content_type": "execution_output", "text": "x"}, {}, "tool message"),
        ("tool", {"content_type": "tether_quote", "text": "x"}, {}, "tool message"),
        ("assistant", {"content_type": "code", "text": "x"}, {"recipient": "python"}, "tool call"),
        ("assistant", {"content_type": "code", "text": "x"}, {"recipient": "all"}, "code message"),
        ("assistant", {"content_type": "thoughts", "thoughts": []}, {}, "thought"),
        ("assistant", {"content_type": "text", "parts": ["x"]}, {"channel": "analysis"}, "thought"),
        ("assistant", {"content_type": "reasoning_recap", "content": "x"}, {}, "thought"),
        ("user", {"content_type": "user_editable_context", "text": "x"}, {}, "custom instruction"),
        ("system", {"content_type": "text", "parts": ["x"]}, {"weight": 0.0}, "hidden message"),
        (
            "system",
            {"content_type": "text", "parts": ["x"]},
            {"metadata": {"is_visually_hidden_from_conversation": True}},
            "hidden message",
        ),
        ("assistant", {"content_type": "text", "parts": None}, {}, "empty message"),
        ("assistant", {"content_type": "text", "parts": [" ", None, 3]}, {}, "empty message"),
        ("assistant", None, {}, "empty message"),
        ("assistant", {"content_type": "new_kind", "text": "x"}, {}, "new_kind message"),
        ("critic", {"content_type": "text", "parts": ["x"]}, {}, "message with another role"),
        (
            "assistant",
            {"content_type": "multimodal_text", "parts": [{"content_type": "image_asset_pointer"}]},
            {},
            "image",
        ),
        (
            "assistant",
            {"content_type": "multimodal_text", "parts": [{"content_type": "audio_asset_pointer"}]},
            {},
            "audio clip",
        ),
    ],
)
def test_what_is_not_visible_text_is_left_out_and_counted(
    role: str, content: object, fields: dict[str, object], kind: str
) -> None:
    conversation = with_content(role, content, **fields)
    assert texts(conversation) == [["u:Q", "a:A"]]
    assert chatgpt_conversations([conversation]).left_out == {kind: 1}


@pytest.mark.parametrize(
    ("role", "content", "expected"),
    [
        ("assistant", {"content_type": "text", "parts": ["x", "y"]}, ["u:Q", "a:x\n\ny\n\nA"]),
        ("user", {"content_type": "text", "text": "x"}, ["u:Q\n\nx", "a:A"]),
        ("user", {"parts": [{"content_type": "audio_transcription", "text": "x"}]}, ["u:Q\n\nx", "a:A"]),
        ("system", "x", ["u:Q", "s:x", "a:A"]),
    ],
)
def test_visible_text_is_kept_in_every_kind_of_part(role: str, content: object, expected: list[str]) -> None:
    found = chatgpt_conversations([with_content(role, content)])
    assert texts(with_content(role, content)) == [expected]
    assert not found.left_out


def test_a_user_message_to_a_named_recipient_is_visible() -> None:
    conversation = with_content("user", {"content_type": "text", "parts": ["x"]}, recipient="g-helper")
    assert texts(conversation) == [["u:Q\n\nx", "a:A"]]


def test_an_attached_file_is_counted_and_the_text_beside_it_stays() -> None:
    metadata = {"attachments": [{"mime_type": "application/pdf"}, {"mime_type": "image/png"}, {}]}
    conversation = with_content("user", {"content_type": "text", "parts": ["see"]}, metadata=metadata)
    assert texts(conversation) == [["u:Q\n\nsee", "a:A"]]
    assert chatgpt_conversations([conversation]).left_out == {"attached file": 2}


def test_the_answer_to_a_picture_is_not_used_as_answer_to_the_text_before() -> None:
    conversation = with_content("user", {"parts": [{"content_type": "image_asset_pointer"}]})
    nodes = conversation["mapping"]
    nodes["a"]["message"]["content"]["parts"] = ["A loaf."]
    nodes |= {"q0": nodes["q"], "first": chat(("first", "q0", "assistant", "A"))["mapping"]["first"]}
    nodes["x"]["parent"] = "first"
    del nodes["q"]
    found = chatgpt_conversations([conversation])
    assert texts(conversation) == [["u:Q", "a:A"]]
    assert found.left_out == {"image": 1, "unprompted answer": 1}


def test_system_text_stays_and_trailing_turns_are_cut() -> None:
    conversation = chat(
        ("s", None, "system", "S"),
        ("q", "s", "user", "Q"),
        ("a", "q", "assistant", "A"),
        ("q2", "a", "user", "Q2"),
        ("s2", "q2", "system", "S2"),
    )
    assert texts(conversation) == [["s:S", "u:Q", "a:A"]]
    left_out = chatgpt_conversations([conversation]).left_out
    assert left_out == {"unanswered user message": 1, "unused system message": 1}


def test_equal_branches_give_one_row_and_a_message_in_two_branches_is_counted_once() -> None:
    conversation = chat(
        ("h", None, "tool", "shared"),
        ("q", "h", "user", "Q"),
        ("a1", "q", "assistant", "A"),
        ("a2", "q", "assistant", "A"),
        ("a3", "q", "assistant", "B"),
    )
    assert texts(conversation) == [["u:Q", "a:A"], ["u:Q", "a:B"]]
    assert chatgpt_conversations([conversation]).left_out == {"tool message": 1, "duplicate branch": 1}


def test_equal_conversations_stay_two_rows() -> None:
    conversation = chat(("q", None, "user", "Q"), ("a", "q", "assistant", "A"))
    assert texts(conversation, conversation) == [["u:Q", "a:A"]] * 2


def test_missing_root_and_missing_children_do_no_harm() -> None:
    conversation = chat(("q", "gone", "user", "Q"), ("a", "q", "assistant", "A"))
    conversation["mapping"]["a"]["children"] = ["never", None, 7]
    assert texts(conversation) == [["u:Q", "a:A"]]


def test_a_node_without_parent_belongs_to_the_one_that_lists_it() -> None:
    conversation = chat(("q", None, "user", "Q"), ("a", "q", "assistant", "A"))
    del conversation["mapping"]["a"]["parent"]
    assert texts(conversation) == [["u:Q", "a:A"]]


def test_loops_end_and_what_they_hide_is_counted() -> None:
    tail = chat(
        ("q", "a", "user", "Q"),
        ("a", "q", "assistant", "A"),
        ("q2", "a", "user", "Q2"),
        ("a2", "q2", "assistant", "A2"),
    )
    assert texts(tail) == [["u:Q", "a:A", "u:Q2", "a:A2"]]
    itself = chat(("q", None, "user", "Q"), ("a", "q", "assistant", "A"))
    itself["mapping"]["a"] |= {"parent": "a", "children": ["a"]}
    itself["mapping"]["q"] |= {"parent": "q", "children": ["q", "a"]}
    itself["mapping"] = dict(reversed(itself["mapping"].items()))
    assert texts(itself) == [["u:Q", "a:A"]]
    closed = chatgpt_conversations([chat(("q", "a", "user", "Q"), ("a", "q", "assistant", "A"))])
    assert closed.rows == []
    assert closed.left_out == {"message in a loop": 2}
    assert len(closed.without_row) == 1


@pytest.mark.parametrize("node", [None, {}, {"message": None, "parent": 3, "children": None}, []])
def test_odd_nodes_are_tolerated(node: object) -> None:
    conversation = chat(("q", None, "user", "Q"), ("a", "q", "assistant", "A"))
    conversation["mapping"]["odd"] = node
    assert texts(conversation) == [["u:Q", "a:A"]]


@pytest.mark.parametrize("export", [{"mapping": None}, {"mapping": []}, {}, None])
def test_conversations_without_messages_are_named(export: object) -> None:
    assert chatgpt_conversations([export]).without_row == ['"(untitled)": it has no messages']


def test_a_conversation_of_ten_thousand_nodes(tmp_path: Path) -> None:
    mapping: dict[str, Any] = {}
    for i in range(10_000):
        message = {"author": {"role": ("user", "assistant")[i % 2]}, "content": {"parts": [f"m{i}"]}}
        mapping[str(i)] = {"parent": str(i - 1) if i else None, "children": [], "message": message}
    outcome = convert_file(put(tmp_path, "long.json", json.dumps([{"title": "long", "mapping": mapping}])))
    assert (outcome.status, outcome.rows) == ("converted", 1)
    assert len(json.loads((tmp_path / "long.jsonl").read_text())["messages"]) == 10_000


def test_lone_surrogates_in_an_export(tmp_path: Path) -> None:
    conversation = chat(("q", None, "user", "é \ud83d"), ("a", "q", "assistant", "A"))
    assert convert_file(put(tmp_path, "x.json", json.dumps([conversation]))).status == "converted"
    assert '"\\u00e9 \\ud83d"' in (tmp_path / "x.jsonl").read_text()


# --- the command -----------------------------------------------------------------------------------------


def test_command_converts_the_data_folder_and_reports_it(tmp_path: Path) -> None:
    put(tmp_path, "data/x.json", PRETTY)
    put(tmp_path, "data/y.jsonl", "{}\n")
    put(tmp_path, "data/eval/belongs_to.json", '{\n"training_files": {}}')  # no data
    checked = run("--check", cwd=tmp_path)
    assert (checked.returncode, (tmp_path / "data/x.jsonl").exists()) == (1, False)
    assert "data/x.json: would be converted (2 rows) to data/x.jsonl" in checked.stdout
    done = run(cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == (
        "data/x.json: converted (2 rows) to data/x.jsonl\ndata/y.jsonl: ok (1 row)\n2 files: 1 converted, 1 ok\n"
    )
    assert (tmp_path / "data/x.jsonl").read_text() == PRETTY_ROWS
    assert run("--check", cwd=tmp_path).returncode == 0


def test_command_exits_with_2_and_still_converts_the_rest(tmp_path: Path) -> None:
    bad = '{\n  "a": 1\n  "b": 2\n}'
    put(tmp_path, "data/bad.json", bad)
    put(tmp_path, "data/good.json", PRETTY)
    result = run("data/bad.json", "data/good.json", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("data/bad.json:3:3: Expecting ',' delimiter. ")
    assert "data/good.json: converted" in result.stdout
    assert (tmp_path / "data/good.jsonl").exists()
    assert run("--check", cwd=tmp_path).returncode == 2


def test_command_force_and_empty_and_missing_folder(tmp_path: Path) -> None:
    assert run(cwd=tmp_path).returncode == 2
    (tmp_path / "data").mkdir()
    empty = run(cwd=tmp_path)
    assert (empty.returncode, empty.stdout.startswith("No .json or .jsonl files found.")) == (0, True)
    put(tmp_path, "data/x.json", PRETTY)
    put(tmp_path, "data/x.jsonl", '{"mine": 1}\n')
    assert run(cwd=tmp_path).returncode == 2
    forced = run("--force", cwd=tmp_path)
    assert forced.returncode == 0
    assert "old rows kept as data/x.jsonl.orig" in forced.stdout


def test_outcome_prints_as_one_report_line() -> None:
    assert str(ConversionResult(Path("data/x.jsonl"), "ok", 3, ": ok (3 rows)")) == "data/x.jsonl: ok (3 rows)"
