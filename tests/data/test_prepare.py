"""From files to tokens: what is left out and why, how often a row is seen, and a cache that is never wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data import prepare, tokens
from src.data.store import TokenStore
from src.errors import DataError
from tests.data.ready import Maker
from tests.fixtures import ROOT, chat, tree

pytest_plugins = ["tests.fixtures", "tests.data.ready"]

LONG = (
    "The upper kiln was stopped at noon because the outer shell had grown too hot near the second burner, and the "
    "crew then waited until evening before they looked at the bricks, of which eleven were found loose or cracked."
)


def sums(count: int) -> list[dict[str, Any]]:
    return [chat(f"{i}+1?", str(i + 1)) for i in range(count)]


def reasons(store: TokenStore) -> dict[int, str]:
    return {r["line"]: r["reason"] for r in store.report["rejected"]}


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
    assert details[4].startswith("is the near duplicate (0.")
    assert details[4].endswith(f"of {file}:2")
    assert found.report["contamination"]["files"] == {str(file): {"exact": 1, "normalised": 1, "near": 1}}
    assert (found.report["rows_in"], found.report["rows_trained"]) == (5, 2)


def test_overlap_with_the_evaluation_files_is_refused_or_kept_where_that_is_asked(make: Maker) -> None:
    make.held_out([{"prompt": "Held out?", "completion": "yes"}], "dev")
    path = make.file("a.jsonl", [chat("2+2?", "4"), chat("Held out?", "yes")])
    with pytest.raises(DataError, match=rf"{path}:2 is the exact duplicate of .*dev\.jsonl:1"):
        make.tokens(on_contamination="refuse")
    kept = make.tokens(on_contamination="keep")
    assert (kept.report["rows_trained"], kept.report["contamination"]["exact"]) == (2, 1)


def test_duplicates_are_told_and_left_out_where_that_is_asked(make: Maker) -> None:
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
    assert report["findings"] == []  # it was asked for
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


def test_without_a_row_left_the_first_reasons_are_told(make: Maker) -> None:
    make.file("a.jsonl", [chat("2+2?", "4" * 99)])
    with pytest.raises(DataError, match=r"a\.jsonl:1 has \d+ tokens, over max_length=16; no row is left"):
        make.tokens(max_length=16)


def test_the_first_rows_and_a_seeded_sample_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PROVEN_FIRST", 100)
    chosen = tokens.to_prove(20_000, every=False, seed=1)
    assert chosen[:100].all()
    assert 120 < chosen[100:].sum() < 280  # one in a hundred
    assert (tokens.to_prove(20_000, every=False, seed=1) == chosen).all()
    assert (tokens.to_prove(20_000, every=False, seed=2) != chosen).any()
    assert tokens.to_prove(20_000, every=True, seed=1).all()


def test_a_mask_that_the_second_derivation_disputes_is_not_trained_on(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.file("a.jsonl", sums(3))
    from src.data.chat import Chat, Rendered, Span

    right = Chat.conversations

    def shifted(self: Chat, *args: Any) -> list[Rendered]:
        first = args[0][0]["content"] == "1+1?"
        return [
            r._replace(answers=tuple(Span(s.start - 3 * first, s.end) for s in r.answers))
            for r in right(self, *args)
        ]

    monkeypatch.setattr(Chat, "conversations", shifted)
    found = make.tokens()
    assert reasons(found) == {2: "disputed_mask"}
    assert found.report["mask"]["disagree"] == 1


def test_several_processes_make_the_same_tokens(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    make.file("a.jsonl", [*sums(60), chat("x", "y" * 999)])
    alone = make.tokens(cache_dir=str(make.folder / "one"))
    monkeypatch.setattr(tokens, "SMALL", 0)
    monkeypatch.setattr(tokens, "BATCH", 7)
    together = make.tokens(cache_dir=str(make.folder / "two"), data_workers=3)
    assert list(alone) == list(together)
    assert alone.report == together.report


# --- the cache -------------------------------------------------------------------------------------------


def test_what_was_read_and_tokenised_is_not_read_again(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    make.file("a.jsonl", sums(5))
    first = make.tokens()
    monkeypatch.delattr("src.data.loader._take")
    monkeypatch.delattr("src.data.tokens._tokens")
    again = make.tokens()
    assert again.folder == first.folder
    assert list(again) == list(first)


@pytest.mark.parametrize(
    "change",
    ["a byte", "another file", "an evaluation row", "max_length", "train_on", "template", "tokenizer", "weight"],
)
def test_whatever_changes_makes_tokens_of_its_own(make: Maker, change: str) -> None:
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


def test_a_torn_cache_is_made_anew(make: Maker) -> None:
    make.file("a.jsonl", sums(5))
    whole = make.tokens()
    before = list(whole)
    for name in ("ids.bin", "learnt.bin", "sizes.json", "ends.npy"):
        (whole.folder / name).write_bytes((whole.folder / name).read_bytes()[:-3])
        again = make.tokens()
        assert again.folder == whole.folder
        assert list(again) == before


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


def test_the_cache_lies_where_it_is_told(make: Maker) -> None:
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
    with pytest.raises(DataError, match=r"b\.jsonl is a symbolic link that leaves"):
        prepare.read(make.config())


def test_a_row_that_gives_away_a_credential_is_not_trained_on(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", 'quo"ted\\canary')
    monkeypatch.setenv("LAKEFS_ENDPOINT", "http://lake.example.org")  # an address is no credential
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


def test_without_a_row_left_by_the_settings_the_reasons_are_told(make: Maker) -> None:
    make.held_out([{"prompt": "Held out?", "completion": "yes"}])
    path = make.file("a.jsonl", [chat("Held out?", "yes")])
    with pytest.raises(DataError) as caught:
        make.read()
    assert caught.value.problems[0].startswith(f"{path}:1 is the exact duplicate of")
    assert caught.value.problems[-1] == f"{path}: no row to train on"
