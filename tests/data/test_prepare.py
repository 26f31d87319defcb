"""From files to tokens: rows that are left out and why, sampling by weight, and the cache."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data import loader, store, tokens
from src.data.store import TokenStore
from src.errors import DataError
from src.utils.files import code_hash
from tests.data.fixtures import Maker, load_training_rows
from tests.fixtures import ROOT, chat, tree

pytest_plugins = ["tests.fixtures", "tests.data.fixtures"]

LONG = (
    "The upper kiln was stopped at noon because the outer shell had grown too hot near the second burner, and the "
    "crew then waited until evening before they looked at the bricks, of which eleven were found loose or cracked."
)


def sums(count: int) -> list[dict[str, Any]]:
    return [chat(f"{i}+1?", str(i + 1)) for i in range(count)]


def reasons(found: TokenStore) -> dict[int, str]:
    return {r["line"]: r["reason"] for r in found.report["rejected"]}


# --- evaluation rows and duplicates ----------------------------------------------------------------------


def test_rows_of_the_evaluation_files_are_left_out_by_name(make: Maker) -> None:
    file = make.held_out(
        [{"prompt": "Held out?", "completion": "yes"}, {"prompt": LONG, "completion": "So it was."}]
    )
    make.file(
        "a.jsonl",
        [
            chat("2+2?", "4"),
            chat("Held out?", "no"),  # the same request, whatever the answer
            chat("2+2?", "4", "held  OUT?", "yes"),  # in a later turn
            chat(LONG.replace("eleven", "twelve"), "So it was."),
            chat("Held out, is it not?", "yes"),
        ],
    )
    found = make.tokens()
    assert reasons(found) == dict.fromkeys((2, 3, 4), "contamination")
    details = {r["line"]: r["detail"] for r in found.report["rejected"]}
    assert details[2] == f"is the exact duplicate of {file}:1"
    assert details[3] == f"is the normalised duplicate of {file}:1"
    (near,) = (m for m in make.read().store.matches("contamination") if m.kind == "near")
    assert 0.8 <= near.similarity < 1
    assert details[4] == f"is the near duplicate ({near.similarity:.2f}) of {file}:2"
    assert found.report["contamination"]["files"] == {str(file): {"exact": 1, "normalised": 1, "near": 1}}
    assert (found.report["rows_in"], found.report["rows_trained"]) == (5, 2)


def test_overlap_with_the_evaluation_files_is_refused_or_kept_if_set(make: Maker) -> None:
    make.held_out([{"prompt": "Held out?", "completion": "yes"}], "dev")
    path = make.file("a.jsonl", [chat("2+2?", "4"), chat("Held out?", "yes")])
    with pytest.raises(DataError, match=rf"{path}:2 is the exact duplicate of .*dev\.jsonl:1"):
        make.tokens(on_contamination="refuse")
    kept = make.tokens(on_contamination="keep")
    assert (kept.report["rows_trained"], kept.report["contamination"]["exact"]) == (2, 1)


def test_duplicates_are_reported_and_rejected_if_set(make: Maker) -> None:
    path = make.file(
        "a.jsonl", [*sums(3), chat("1+1?", "2"), chat("0+1 ?", "1"), chat(LONG, "A"), chat(LONG + " So?", "A")]
    )
    kept = make.tokens()
    assert {k: kept.report["duplicates"][k] for k in ("exact", "normalised", "near")} == {
        "exact": 1,
        "normalised": 0,
        "near": 1,
    }
    assert kept.report["duplicates"]["rows"][0] == {
        "file": str(path),
        "line": 4,
        "kind": "exact",
        "similarity": 1.0,
        "of": f"{path}:2",
    }
    assert (kept.report["rows_trained"], len(kept)) == (7, 7)
    left = make.tokens(on_duplicate="reject")
    assert reasons(left) == {4: "duplicate", 7: "duplicate"}
    assert (left.report["rows_trained"], len(left)) == (5, 5)


def test_a_row_that_may_go_for_several_reasons_goes_once_and_for_the_first(make: Maker) -> None:
    make.held_out([{"prompt": "Held out?", "completion": "yes"}])
    rows = [chat("Held out?", "yes"), chat("Held out?", "yes"), *sums(20), *[chat("0+1?", "1")] * 20]
    path = make.file("a.jsonl", rows)
    found = make.tokens(on_duplicate="reject", datasets=[{"path": str(path), "weight": 0.5}], seed=3)
    lines = [r["line"] for r in found.report["rejected"]]
    assert lines == sorted(set(lines))
    assert (reasons(found)[1], reasons(found)[2]) == ("contamination", "contamination")
    assert {reasons(found)[line] for line in range(23, 43)} == {"duplicate"}
    assert found.report["rows_in"] == found.report["rows_trained"] + len(lines)


def test_a_copy_of_an_evaluation_file_is_refused_before_it_is_read(make: Maker) -> None:
    rows = [{"prompt": "Held out?", "completion": "yes"}]
    held, path = make.held_out(rows), make.file("a.jsonl", rows)
    with pytest.raises(DataError, match=re.escape(f"training file {path} is the evaluation file {held}")):
        load_training_rows(make.config(data_format="prompt_completion"))
    assert not (make.folder / "outputs").exists()


# --- weights ---------------------------------------------------------------------------------------------


def test_a_weight_says_how_often_an_epoch_sees_a_row(make: Maker) -> None:
    thrice, half, once = (
        make.file(f"{n}.jsonl", [chat(f"{n} {i}?", f"{n}{i}") for i in range(40)])
        for n in ("thrice", "half", "once")
    )
    entries = [
        {"path": str(thrice), "weight": 3},
        {"path": str(half), "weight": 0.5},
        {"path": str(once), "weight": 1},
    ]
    found = make.tokens(datasets=entries)
    seen = Counter(make.texts(found))
    assert {seen[f"thrice{i}<|end|>"] for i in range(40)} == {3}
    assert {seen[f"once{i}<|end|>"] for i in range(40)} == {1}
    assert {seen[f"half{i}<|end|>"] for i in range(40)} == {0, 1}
    halved = sum(seen[f"half{i}<|end|>"] for i in range(40))
    assert 10 < halved < 30
    report = found.report
    assert report["rejected_by_reason"] == {"not_sampled": 40 - halved}
    assert report["rows_in"] == report["rows_trained"] + len(report["rejected"])
    assert {(r["file"], r["detail"]) for r in report["rejected"]} == {(str(half), "is left out by weight=0.5")}
    assert [(f["rows_in"], f["rows_trained"]) for f in report["files"]] == [(40, 40), (40, halved), (40, 40)]
    assert (report["rows_trained"], report["examples"], len(found)) == (80 + halved, 80 + halved, 160 + halved)
    assert report["findings"] == []  # a setting selects it
    assert make.read(datasets=entries).version == {
        "sources": [{"type": "local", "weight": weight} for weight in (3, 0.5, 1)]
    }
    assert make.texts(make.tokens(datasets=entries)) == make.texts(found)
    assert make.texts(make.tokens(datasets=entries, seed=7)) != make.texts(found)


def test_a_weight_between_one_and_two_repeats_some_rows(make: Maker) -> None:
    path = make.file("a.jsonl", sums(40))
    seen = Counter(make.texts(make.tokens(datasets=[{"path": str(path), "weight": 1.5}])))
    assert set(seen.values()) == {1, 2}


# --- settings of the rows --------------------------------------------------------------------------------


def test_settings_reach_the_rows(make: Maker) -> None:
    make.file("a.jsonl", [chat("2+2?", "4", "3+3?", "6"), chat("4 " * 90 + "?", "8")])
    assert make.texts(make.tokens(train_on="last_turn", max_length=64)) == ["6<|end|>"]
    cut = make.tokens(on_overlength="truncate_prompt", max_length=64)
    assert make.texts(cut) == ["4<|end|>6<|end|>", "8<|end|>"]
    assert max(len(e.ids) for e in cut) <= 64
    assert [(c["line"], c["detail"][:10]) for c in cut.report["cut"]] == [(2, "prompt cut")]


def test_without_a_row_left_the_first_reasons_are_reported(make: Maker) -> None:
    make.file("a.jsonl", [chat("2+2?", "4" * 99)])
    with pytest.raises(DataError, match=r"a\.jsonl:1 has \d+ tokens, over max_length=16; no row is left"):
        make.tokens(max_length=16)


def test_the_first_rows_and_a_seeded_sample_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "VERIFIED_FIRST", 100)
    chosen = tokens.rows_to_verify(20_000, every=False, seed=1)
    assert chosen[:100].all()
    assert 120 < chosen[100:].sum() < 280  # one in a hundred
    assert (tokens.rows_to_verify(20_000, every=False, seed=1) == chosen).all()
    assert (tokens.rows_to_verify(20_000, every=False, seed=2) != chosen).any()
    assert tokens.rows_to_verify(20_000, every=True, seed=1).all()


def test_which_rows_are_proven_is_chosen_by_the_settings(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    make.file("a.jsonl", sums(40))
    monkeypatch.setattr(tokens, "VERIFIED_FIRST", 3)
    monkeypatch.setattr(tokens, "VERIFIED_SHARE", 0)
    assert make.tokens().report["mask"]["checked"] == 3
    assert make.tokens(check_mask="all").report["mask"]["checked"] == 40
    monkeypatch.setattr(tokens, "VERIFIED_SHARE", 0.5)
    assert len({make.tokens(seed=seed).report["mask"]["checked"] for seed in range(1, 7)}) > 1


def test_five_thousand_rows_and_one_in_a_hundred_of_the_rest_are_proven() -> None:
    chosen = tokens.rows_to_verify(50_000, every=False, seed=1)
    assert chosen[:5_000].all()
    assert 350 < chosen[5_000:].sum() < 550


def test_a_mask_without_a_second_derivation_is_counted_and_trained_on(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.file("a.jsonl", sums(3))
    monkeypatch.setattr(type(make.tokenizer), "is_fast", False)
    found = make.tokens().report
    why = "the tokenizer gives no offsets"
    assert found["mask"] == {"checked": 3, "agree": 0, "disagree": 0, "not_comparable": {why: 3}}
    assert (found["rows_trained"], found["findings"]) == (
        3,
        ["3 masks could not be compared with a second derivation"],
    )


def test_num_proc_processes_work_if_there_is_enough_data(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(work: Any, items: Any, processes: int) -> Any:
        asked.append(processes)
        return map(work, items)

    for module in (loader, tokens):
        monkeypatch.setattr(module, "map_ordered", noted)
        monkeypatch.setattr(module, "cores", lambda: 7)
    make.file("a.jsonl", sums(5))
    make.tokens(num_proc=3)
    assert asked == [1, 1]  # few rows are processed by one process
    for module in (loader, tokens):
        monkeypatch.setattr(module, "SMALL", 0)
    make.tokens(num_proc=3, cache_dir=str(make.folder / "three"))
    make.tokens(cache_dir=str(make.folder / "all"))
    assert asked[2:] == [3, 3, 7, 7]


def test_each_text_of_a_row_is_proven(make: Maker) -> None:
    make.tokenizer.chat_template = make.tokenizer.chat_template.replace(
        "message['content']", "(message['content'] if loop.last else message['content'].split('|')[-1])"
    )
    make.file("a.jsonl", [chat("2+2?", "4"), chat("2+2?", "two and two|4", "3+3?", "three and three|6")])
    found = make.tokens()
    assert make.texts(found) == ["4<|end|>", "two and two|4<|end|>", "three and three|6<|end|>"]
    assert (found.report["mask"]["checked"], found.report["rows_trained"]) == (3, 2)


def test_answers_without_an_end_of_turn_are_counted_over_all_batches(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH", 2)
    make.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '[end]\\n' }}{% endfor %}"
        + ("{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    )
    make.file("a.jsonl", sums(5))
    assert make.tokens().report["no_end_of_turn"] == 5


def test_a_mask_that_the_second_derivation_disputes_is_not_trained_on(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.file("a.jsonl", sums(3))
    from src.data.answer_text import CharSpan
    from src.data.chat import ChatTokenizer
    from src.data.segments import RenderedChat

    right = ChatTokenizer.training_texts

    def shifted(self: ChatTokenizer, *args: Any) -> list[RenderedChat]:
        first = args[0].messages[0]["content"] == "1+1?"
        return [
            r._replace(answer_spans=tuple(CharSpan(s.start - 3 * first, s.end) for s in r.answer_spans))
            for r in right(self, *args)
        ]

    monkeypatch.setattr(ChatTokenizer, "training_texts", shifted)
    found = make.tokens()
    assert reasons(found) == {2: "disputed_mask"}
    assert found.report["mask"]["disagree"] == 1


def test_several_processes_make_the_same_tokens(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    make.file("a.jsonl", [*sums(60), chat("x", "y" * 999)])
    alone = make.tokens(cache_dir=str(make.folder / "one"))
    monkeypatch.setattr(tokens, "SMALL", 0)
    monkeypatch.setattr(tokens, "BATCH", 7)
    together = make.tokens(cache_dir=str(make.folder / "two"), num_proc=3)
    assert list(alone) == list(together)
    assert alone.report == together.report


# --- the cache -------------------------------------------------------------------------------------------


def test_what_was_read_and_tokenised_is_not_read_again(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    make.file("a.jsonl", sums(5))
    first = make.tokens()
    monkeypatch.delattr("src.data.loader._parse_batch")
    monkeypatch.delattr("src.data.tokens._tokenize_batch")
    again = make.tokens()
    assert again.folder == first.folder
    assert list(again) == list(first)


@pytest.mark.parametrize(
    "change",
    ["a byte", "another file", "an evaluation row", "max_length", "train_on", "template", "tokenizer", "weight"],
)
def test_every_change_of_the_inputs_builds_new_tokens(make: Maker, change: str) -> None:
    path = make.file("a.jsonl", [*sums(5), chat("2+2?", "4", "3+3?", "6")])
    settings: dict[str, Any] = {"datasets": [{"path": str(make.folder / "data"), "weight": 1}]}
    before = make.tokens(**settings)
    if change == "a byte":
        path.write_bytes(path.read_bytes().replace(b"0+1", b"9+1"))
    elif change == "another file":
        make.file("b.jsonl", [chat("7+7?", "14")])
    elif change == "an evaluation row":
        make.held_out([{"prompt": "3+1?", "completion": "4"}])
    elif change == "template":
        make.tokenizer.chat_template = make.tokenizer.chat_template.replace("<|start|>", "<|start|> ")
    elif change == "tokenizer":
        make.tokenizer.add_tokens(["+1?"])
    elif change == "weight":
        settings["datasets"][0]["weight"] = 2
    else:
        settings |= {"max_length": 48, "train_on": "last_turn"}
    after = make.tokens(**settings)
    assert after.folder != before.folder
    assert (
        [list(e.ids) for e in after] != [list(e.ids) for e in before]
        or change == "max_length"
        or (after.report["tokens"]["with_loss"] != before.report["tokens"]["with_loss"])
    )


def test_a_corrupt_cache_is_built_again(make: Maker) -> None:
    make.file("a.jsonl", sums(5))
    whole = make.tokens()
    before = list(whole)
    for name in ("ids.bin", "loss_mask.bin", "sizes.json", "ends.npy"):
        (whole.folder / name).write_bytes((whole.folder / name).read_bytes()[:-3])
        again = make.tokens()
        assert again.folder == whole.folder
        assert list(again) == before


def test_a_cache_that_lost_a_file_is_made_again(make: Maker) -> None:
    make.file("a.jsonl", sums(5))
    before = list(make.tokens())
    for file in sorted((make.folder / "outputs" / "cache").rglob("*.*")):
        if file.is_file():
            file.unlink()
            assert list(make.tokens()) == before


@pytest.mark.parametrize(
    "setting",
    [
        {"max_length": 48},
        {"train_on": "last_turn"},
        {"on_overlength": "truncate"},
        {"on_contamination": "keep"},
        {"on_duplicate": "reject"},
        {"dedup_threshold": 0.99},
        {"check_mask": "all"},
        {"data_format": "messages"},
    ],
)
def test_each_setting_by_itself_finds_no_tokens_of_another(
    make: Maker, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any]
) -> None:
    monkeypatch.setattr(tokens, "VERIFIED_FIRST", 1)
    monkeypatch.setattr(tokens, "VERIFIED_SHARE", 0)
    make.held_out([{"prompt": "Held out?", "completion": "yes"}])
    long = [chat("2+2?", "4" * size) for size in (20, 200)]
    near = [chat(LONG, "So."), chat(LONG.replace("eleven", "twelve"), "So.")]
    make.file(
        "a.jsonl", [chat("1+1?", "2", "2+2?", "4"), chat("Held out?", "no"), *sums(2), *sums(2), *long, *near]
    )
    make.file("b.jsonl", [{"prompt": "9+9?", "completion": "18"}])
    before, after = make.tokens(max_length=128), make.tokens(**{"max_length": 128, **setting})
    fresh = make.tokens(**{"max_length": 128, **setting}, cache_dir=str(make.folder / "fresh"))
    assert (list(after), after.report) == (list(fresh), fresh.report)
    assert after.report != before.report


def test_a_template_that_writes_the_date_has_tokens_for_a_day(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date.today() + timedelta(days=1)

    make.file("a.jsonl", sums(2))
    undated = make.tokens().folder
    monkeypatch.setattr("src.data.chat.date", Tomorrow)
    assert make.tokens().folder == undated
    make.tokenizer.chat_template = "{{ strftime_now('%Y') }}" + make.tokenizer.chat_template
    tomorrow = make.tokens().folder
    monkeypatch.undo()
    assert make.tokens().folder != tomorrow


def test_a_file_is_read_again_by_other_columns(make: Maker) -> None:
    make.file("a.jsonl", [{"q": "2+2?", "a": "4", "b": "four"}])
    assert make.texts(make.tokens(question_key="q", answer_key="a")) == ["4<|end|>"]
    assert make.texts(make.tokens(question_key="q", answer_key="b")) == ["four<|end|>"]


def test_a_renamed_file_is_named_by_its_own_name(make: Maker) -> None:
    path = make.file("a.jsonl", [*sums(2), {}])
    make.tokens()
    path = path.rename(path.with_name("b.jsonl"))
    report = make.tokens().report
    assert [f["file"] for f in (*report["files"], *report["rejected"])] == [str(path)] * 2


def test_a_renamed_evaluation_file_is_reported_by_its_own_name(make: Maker) -> None:
    make.file("a.jsonl", [chat("2+2?", "4"), chat("Held out?", "yes")])
    held = make.held_out([{"prompt": "Held out?", "completion": "yes"}])
    make.tokens()
    held = held.rename(held.with_name("dev.jsonl"))
    report = make.tokens().report
    assert report["contamination"]["files"] == {str(held): {"exact": 1, "normalised": 0, "near": 0}}
    assert report["rejected"][0]["detail"] == f"is the exact duplicate of {held}:1"


def test_evaluation_rows_that_changed_are_compared_again(make: Maker) -> None:
    make.file("a.jsonl", [chat("2+2?", "4"), chat("Held out?", "yes")])
    for request, found in (("Something else?", {}), ("Held out?", {2: "contamination"}), ("Held up?", {})):
        make.held_out([{"prompt": request, "completion": "yes"}])
        assert reasons(make.tokens()) == found


@pytest.mark.parametrize("file", ["code.py", "readers/code.py"])
def test_changed_code_finds_nothing_that_the_old_code_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    keys = []
    for code in ("x = 1", "x = 2"):
        (tmp_path / file).write_text(code)
        code_hash.cache_clear()
        keys.append(store.content_key(of="the same"))
    assert len(set(keys)) == 2


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.1, 0.3])
def test_a_kill_at_any_moment_leaves_no_cache_that_is_wrong(make: Maker, tiny: Path, moment: float) -> None:
    make.file("a.jsonl", [chat(f"{i}+1?", f"{i + 1} " * 5) for i in range(3000)])
    words = [f"dataset_path={make.folder / 'data'}", f"eval_path={make.folder / 'eval'}", f"model_name={tiny}"]
    words += [f"output_dir={make.folder / 'outputs'}", f"cache_dir={make.folder / 'killed'}"]
    command = [sys.executable, "-m", "src.main", "check-data", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        killed = make.folder / "killed"
        while not list(killed.rglob("*.tmp")) and child.poll() is None:
            time.sleep(0.005)
        time.sleep(moment)
        child.send_signal(signal.SIGKILL)
    left = make.tokens(cache_dir=str(killed), max_length=512)
    fresh = make.tokens(cache_dir=str(make.folder / "fresh"), max_length=512)
    assert list(left) == list(fresh)
    assert left.report == fresh.report


def test_tokens_are_read_in_place_and_by_slices(make: Maker) -> None:
    make.file("a.jsonl", sums(5))
    found = make.tokens()
    assert found[1:3] == [found[1], found[2]]
    assert found[-1] == found[4]
    with pytest.raises(IndexError):
        found[5]
    assert isinstance(found._ids, np.memmap)


def test_cache_dir_sets_the_folder_of_the_cache(make: Maker) -> None:
    make.file("a.jsonl", sums(2))
    make.tokens(cache_dir=str(make.folder / "elsewhere"))
    assert not (make.folder / "outputs" / "cache").exists()
    assert {name.split(os.sep)[0] for name in tree(make.folder / "elsewhere")} == {"rows", "tokens"}
    make.tokens()
    assert (make.folder / "outputs" / "cache" / "tokens").is_dir()


def test_data_under_the_folder_of_a_link_that_leaves_it_is_refused(make: Maker) -> None:
    (make.folder / "outside.jsonl").write_text("{}")
    make.file("a.jsonl", sums(2))
    (make.folder / "data" / "b.jsonl").symlink_to(make.folder / "outside.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl is a symbolic link to a file outside"):
        load_training_rows(make.config())


def test_a_row_that_gives_away_a_credential_is_not_trained_on(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", 'quo"ted\\canary')
    monkeypatch.setenv("LAKEFS_ENDPOINT", "http://lake.example.org")  # an address is not a credential
    make.file(
        "a.jsonl",
        [chat("2+2?", "4"), chat("Key?", 'It is quo"ted\\canary.'), chat("http://lake.example.org?", "yes")],
    )
    found = make.tokens()
    assert reasons(found) == {2: "secret"}
    assert found.report["rejected"][0]["detail"] == "holds the value of the environment variable MY_PASSWORD"
    assert not [name for name, content in tree(make.folder / "outputs").items() if b"canary" in content]


def test_a_credential_that_was_set_later_is_found_in_rows_read_before(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.file("a.jsonl", [chat("2+2?", "4"), chat("Key?", "late-canary")])
    assert make.tokens().report["rows_trained"] == 2
    monkeypatch.setenv("MY_PASSWORD", "late-canary")
    assert reasons(make.tokens()) == {2: "secret"}


def test_without_a_row_left_by_the_settings_the_reasons_are_reported(make: Maker) -> None:
    make.held_out([{"prompt": "Held out?", "completion": "yes"}])
    path = make.file("a.jsonl", [chat("Held out?", "yes")])
    with pytest.raises(DataError) as caught:
        make.read()
    assert caught.value.problems[0].startswith(f"{path}:1 is the exact duplicate of")
    assert caught.value.problems[-1] == f"{path}: no row to train on"


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_credential_in_the_arguments_of_a_call_is_found(
    make: Maker, monkeypatch: pytest.MonkeyPatch, ascii_only: bool
) -> None:
    monkeypatch.setenv("MY_PASSWORD", 'quo"ted\\ünï-canary')
    arguments = json.dumps({"key": 'quo"ted\\ünï-canary'}, ensure_ascii=ascii_only)
    call = {"type": "function", "function": {"name": "log_in", "arguments": arguments}}
    turns = [{"role": "user", "content": "Log in."}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    make.file("a.jsonl", [chat("2+2?", "4"), {"messages": turns}])
    assert reasons(make.tokens()) == {2: "secret"}


def test_overlaps_are_counted_for_a_file_with_a_secret_in_its_name(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_0123456789")
    make.held_out([{"prompt": "Held out?", "completion": "yes"}], "hf_canary_0123456789")
    make.file("a.jsonl", [chat("2+2?", "4"), chat("Held out?", "yes")])
    (counts,) = make.tokens().report["contamination"]["files"].values()
    assert counts == {"exact": 1, "normalised": 0, "near": 0}


def test_a_weight_alone_does_not_have_the_rows_read_again(make: Maker) -> None:
    path = make.file("a.jsonl", sums(3))
    folders = {make.read(datasets=[{"path": str(path), "weight": weight}]).store.folder for weight in (1, 2)}
    assert len(folders) == 1
