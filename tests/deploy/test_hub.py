"""Publishing to the Hub with the real client and a local server: one commit, one tag, verified, whatever fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, validate_repo_id

from src import config, schema
from src.deploy import hub_client
from src.deploy.export import assemble
from src.deploy.hub import Publication
from src.eval.verdict import Verdict
from src.runs import Run
from src.utils.files import sha256
from tests.conftest import HEAVY, AssayCommand
from tests.data.hub_server import closed_port
from tests.deploy.direct import REPO
from tests.deploy.direct import to_hub as publish
from tests.deploy.hub_server import CUT, DROP, HALF, LOST, SLOW, ModelHub, Repo, User, model_hub
from tests.fixtures import World, tree

pytest_plugins = ["tests.fixtures"]

Capture = pytest.CaptureFixture[str]
TOKEN = "hf_token-of-the-tests"
RATE = {"RateLimit": '"api";r=0;t=42', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    with model_hub() as server:
        server.users = {TOKEN: User("me", orgs=("works",)), "hf_other-token": User("you")}
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between retries in seconds; the tests do not wait."""
    found: list[float] = []
    monkeypatch.setattr("src.deploy.hub.time.sleep", found.append)
    return found


def refused(world: World, capsys: Capture, path: Path | None = None, repo: str = REPO, **settings: Any) -> str:
    """The error message of a publication that is refused: one line."""
    capsys.readouterr()
    assert publish(world, path, repo, **settings) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert TOKEN not in line
    return line


def notes(run: Run) -> list[dict[str, Any]]:
    return [note for note in run.manifest.get("published", []) if note["target"] == "hub"]


def assert_published_once(hub: ModelHub, run: Run, repo: str = REPO) -> Repo:
    """One commit on top of the Hub's first one, with every file of its manifest; one tag; one record."""
    found = hub.repos[repo]
    (commit,) = found.published
    assert found.tags == {run.id: found.head}
    (note,) = [n for n in notes(run) if n["repo"] == repo]
    assert (note["commit"], note["tag"], note["files"]) == (found.head, run.id, len(commit.files) - 1)
    assert json.loads(commit.files["manifest.json"])["sha256"].keys() | {"manifest.json", ".gitattributes"} == set(
        commit.files
    )
    assert not list(run.path.glob(".publish*"))
    return found


# What is published


def test_one_commit_holds_what_a_local_publication_does(copied: World, hub: ModelHub, capsys: Capture) -> None:
    run = copied.newest
    assert copied.call("publish", "gate.verify_examples=0") == 0
    assert copied.call("publish-hf", "--repo", REPO, "gate.verify_examples=0") == 0
    repo = assert_published_once(hub, run)
    (commit,) = repo.published
    files = dict(commit.files)
    del files[".gitattributes"]
    local = tree(copied.artifacts / "models" / "tiny-lora" / run.id)
    assert files.keys() == local.keys()
    # the base's path, which the program of the card reads on this machine
    assert {n for n in files if files[n] != local[n]} == {"adapter_config.json", "manifest.json", "README.md"}
    assert commit.large == {"adapter_model.safetensors"}
    assert commit.title == f"Assay run {run.id}"
    assert repo.private
    assert [request.step for request in hub.requests if not request.authorized] == ["put"]
    out = capsys.readouterr().out
    assert f"published to {hub.endpoint}/me/ingot/tree/{run.id} (private; commit {str(repo.head)[:12]}; " in out


def test_publish_with_target_hub_is_publish_hf(copied: World, hub: ModelHub) -> None:
    words = ("target=hub", f"repo_id={REPO}", "gate.verify_examples=0")
    assert copied.call("publish", *words) == 0
    assert_published_once(hub, copied.newest)
    hub.requests.clear()
    assert copied.call("publish-hf", "--repo", REPO, "gate.verify_examples=0") == 0
    assert "commit" not in hub.steps()
    assert not (copied.artifacts / "models").exists()


def test_publish_hf_to_another_target_is_refused(copied: World, hub: ModelHub, capsys: Capture) -> None:
    assert copied.call("publish-hf", "--repo", REPO, "target=local") == 2
    assert capsys.readouterr().err.startswith(
        "target=local: publish-hf publishes to the Hub; write publish target=local"
    )
    assert hub.requests == [] and not (copied.artifacts / "models").exists()


@pytest.mark.parametrize("stage", ["publish", "publish-hf"])
def test_a_target_that_is_not_in_the_table_is_refused(copied: World, stage: str, capsys: Capture) -> None:
    assert copied.call(stage, "target=hubb") == 2
    known = ", ".join(get_args(schema.TargetName))
    assert f"target=hubb: should be one of {known}; did you mean hub?" in capsys.readouterr().err


def test_a_local_base_model_gets_a_name_that_the_hub_cannot_resolve(copied: World, hub: ModelHub) -> None:
    assert publish(copied) == 0
    settings = json.loads(hub.repos[REPO].published[0].files["adapter_config.json"])
    assert settings["base_model_name_or_path"] == f"./{copied.model.name}"
    with pytest.raises(HFValidationError):
        validate_repo_id(settings["base_model_name_or_path"])
    local = json.loads((copied.newest.model / "adapter_config.json").read_text())
    assert local | {"base_model_name_or_path": ""} == settings | {"base_model_name_or_path": ""}
    assert local["base_model_name_or_path"] == str(copied.model)


def test_the_manifest_of_the_run_records_the_publication(copied: World, hub: ModelHub) -> None:
    assert publish(copied) == 0
    (note,) = notes(copied.newest)
    assert note["at"] >= copied.newest.manifest["ended"]
    del note["at"]
    commit = hub.repos[REPO].published[0]
    size = sum(map(len, commit.files.values())) - len(commit.files[".gitattributes"])
    assert note == {
        "where": f"{hub.endpoint}/me/ingot/tree/{copied.newest.id}", "target": "hub", "endpoint": hub.endpoint,
        "repo": REPO, "commit": hub.repos[REPO].head, "tag": copied.newest.id,
        "url": f"{hub.endpoint}/me/ingot/tree/{copied.newest.id}", "private": True,
        "files": len(commit.files) - 1, "bytes": size, "promoted": True, "verdict": note["verdict"],
    }  # fmt: skip


def test_publishing_again_sends_nothing(copied: World, hub: ModelHub) -> None:
    assert publish(copied) == 0
    hub.requests.clear()
    assert publish(copied) == 0
    assert_published_once(hub, copied.newest)
    assert set(hub.steps()) == {"whoami", "info", "refs", "tree"}


def test_the_repository_is_that_of_the_environment(
    copied: World, hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_REPO_ID", "works/ingot")
    assert copied.call("publish-hf", "gate.verify_examples=0") == 0
    assert_published_once(hub, copied.newest, "works/ingot")


def test_a_published_model_loads_like_the_local_one(
    copied: World, hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert publish(copied) == 0
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    files = dict(hub.repos[REPO].published[0].files)
    tag, cache = copied.newest.id, tmp_path / "cache"
    downloaded = snapshot_download(
        REPO, revision=tag, local_dir=tmp_path / "downloaded", endpoint=hub.endpoint, cache_dir=cache
    )
    assert {k: v for k, v in tree(Path(downloaded)).items() if not k.startswith(".cache")} == files
    card = hf_hub_download(REPO, "README.md", revision=tag, endpoint=hub.endpoint, cache_dir=cache)
    assert Path(card).read_bytes() == files["README.md"]

    tokenizer = AutoTokenizer.from_pretrained(REPO, revision=tag, cache_dir=cache)
    assert (
        tokenizer("mill rate").input_ids
        == AutoTokenizer.from_pretrained(copied.newest.model)("mill rate").input_ids
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(copied.model), downloaded)
    local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(copied.model), copied.newest.model)
    weights = dict(local.named_parameters())
    assert all(bool((weight == weights[name]).all()) for name, weight in model.named_parameters())


# Visibility


def test_public_is_public(copied: World, hub: ModelHub) -> None:
    assert publish(copied, private=False) == 0
    assert not assert_published_once(hub, copied.newest).private
    assert notes(copied.newest)[0]["private"] is False


def test_a_public_repository_needs_the_flag(copied: World, hub: ModelHub, capsys: Capture) -> None:
    repo = hub.create(REPO, private=False)
    assert f"{REPO} is public on the Hub; nothing was sent" in refused(copied, capsys)
    assert "publish-hf: --public" in refused(copied, capsys)
    assert repo.published == []
    assert publish(copied, private=False) == 0


def test_a_private_repository_stays_private(copied: World, hub: ModelHub, capsys: Capture) -> None:
    hub.create(REPO, private=True)
    assert publish(copied, private=False) == 0
    assert f"{REPO} was private and stays private" in capsys.readouterr().out
    assert hub.repos[REPO].private


# Earlier content of the repository


def another(run: Run, **files: str | None) -> Run:
    """A later run whose model has other `files`: their text, or None for a deleted file."""
    later = Run(run.path.with_name("2099-01-01_00-00-00"))
    shutil.copytree(run.path, later.path)
    later.update(run=later.id, published=[])
    for name, content in files.items():
        path = later.model / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
    later.update(model_files={p.name: sha256(p) for p in later.model.iterdir()})
    return later


def test_a_later_run_replaces_the_files_of_an_earlier_one(copied: World, hub: ModelHub, capsys: Capture) -> None:
    first = copied.newest
    assert publish(copied) == 0
    repo = hub.repos[REPO]
    before = repo.head
    hub.change(REPO, **{"images__loss.png": "drawn by hand"})
    later = another(first, tokenization__json=None, new__json="{}")
    assert publish(copied, later.path) == 0
    one, other, two = repo.published
    assert (one.title, other.title, two.title) == (
        f"Assay run {first.id}", "by somebody else", f"Assay run {later.id}",
    )  # fmt: skip
    assert "tokenization.json" in one.files
    assert two.files.keys() - one.files.keys() == {"new.json", "images/loss.png"}
    assert one.files.keys() - two.files.keys() == {"tokenization.json"}
    assert repo.tags == {first.id: before, later.id: repo.head}
    assert f"{REPO} keeps files that Assay did not publish: images/loss.png" in capsys.readouterr().out


def test_an_earlier_run_keeps_its_tag(copied: World, hub: ModelHub) -> None:
    run = copied.newest
    assert publish(copied, run.path) == 0
    assert publish(copied, another(run, new__json="{}").path) == 0
    assert publish(copied, run.path) == 0
    assert len(hub.repos[REPO].published) == 2


def test_files_that_no_manifest_of_ours_lists_are_kept(copied: World, hub: ModelHub) -> None:
    hub.create(REPO, **{"notes.txt": "mine", "manifest.json": "[not ours", "README.md": "# old"})
    assert publish(copied) == 0
    files = hub.repos[REPO].published[-1].files
    assert files["notes.txt"] == b"mine"
    assert b"# tiny-lora" in files["README.md"]
    assert "sha256" in json.loads(files["manifest.json"])


def test_a_concurrent_change_by_somebody_else_is_kept(copied: World, hub: ModelHub, capsys: Capture) -> None:
    hub.fault("commit", call=lambda: hub.change(REPO, notes="theirs") and None)
    assert publish(copied) == 0
    theirs, ours = hub.repos[REPO].published
    assert theirs.title == "by somebody else"
    assert ours.files["notes"] == b"theirs"
    assert ours.parent == next(sha for sha, commit in hub.repos[REPO].commits.items() if commit is theirs)
    assert f"somebody else changed {REPO} at the same time; trying again" in capsys.readouterr().out


def test_a_repository_that_keeps_changing_is_an_error(copied: World, hub: ModelHub, capsys: Capture) -> None:
    counter = iter(range(100))
    hub.fault("commit", times=None, call=lambda: hub.change(REPO, notes=str(next(counter))) and None)
    line = refused(copied, capsys)
    assert f"somebody else changed {REPO} at the same time; {REPO} exists; nothing was committed; run the" in line
    assert [commit.title for commit in hub.repos[REPO].published] == ["by somebody else"] * 3


def test_a_tag_of_another_model_is_not_moved(copied: World, hub: ModelHub, capsys: Capture) -> None:
    run, repo = copied.newest, hub.create(REPO, **{"README.md": "# another"})
    assert repo.head is not None
    repo.tags[run.id] = repo.head
    line = refused(copied, capsys)
    assert f"tag {run.id} of {REPO} is commit {repo.head[:12]}, which has another model (" in line
    assert f"hf repos tag delete {REPO} {run.id}" in line
    assert len(repo.published) == 1 and repo.tags == {run.id: repo.head}


def test_a_concurrently_set_tag_is_checked(copied: World, hub: ModelHub) -> None:
    run = copied.newest

    def set_tag() -> None:
        repo = hub.repos[REPO]
        assert repo.head is not None
        repo.tags[run.id] = repo.head

    hub.fault("tag", call=set_tag)
    assert publish(copied) == 0
    assert_published_once(hub, run)


# Transient failures

WRITING = ("validate", "preupload", "batch", "put", "verify", "commit", "tag")
READING = ("whoami", "create", "info", "refs", "tree")


@pytest.fixture
def folder(finished: World, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The folder to publish, and the hashes of its files."""
    cfg = config.load("publish-hf", {"repo_id": REPO})
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder, assemble(finished.newest, cfg, Verdict("promoted", "better", {}), folder)


@pytest.mark.parametrize("step", [*READING, *WRITING])
def test_a_transient_failure_is_retried(
    hub: ModelHub, waits: list[float], folder: tuple[Path, dict[str, str]], step: str
) -> None:
    """Every kind of failure at every step leaves one commit and one tag."""
    for n, kind in enumerate((408, 429, 500, 502, 503, 504, DROP, HALF, LOST, CUT)):
        hub.fault(step, kind)
        hub.objects.clear()
        Publication(f"me/{step}-{n}", True, "a-run", *folder).publish()
        assert waits == [1.0], kind
        repo = hub.repos[f"me/{step}-{n}"]
        assert len(repo.published) == 1 and repo.tags == {"a-run": repo.head}, kind
        waits.clear()


@pytest.mark.parametrize("kind", [503, LOST])
def test_a_file_is_not_sent_twice(copied: World, hub: ModelHub, waits: list[float], kind: str | int) -> None:
    for step in ("verify", "commit", "tag"):
        hub.fault(step, kind)
    assert publish(copied) == 0
    assert hub.steps().count("put") == 1
    assert_published_once(hub, copied.newest)


def test_waits_double_and_retries_are_limited(
    copied: World, hub: ModelHub, waits: list[float], capsys: Capture
) -> None:
    hub.fault("refs", 503, times=None)
    line = refused(copied, capsys)
    assert waits == [1, 2, 4, 8, 16]
    host = hub.endpoint.removeprefix("http://")
    assert line == (
        f"{host} responded with 503; nothing was sent, and {REPO} exists; run the same command again to resume\n"
    )


@pytest.mark.parametrize(
    ("headers", "seconds"), [({"Retry-After": "7"}, 7), (RATE, 42), (RATE | {"Retry-After": "7"}, 42), ({}, 1)]
)
def test_the_hub_sets_the_time_to_wait(
    copied: World, hub: ModelHub, waits: list[float], headers: dict[str, str], seconds: int
) -> None:
    hub.fault("preupload", 429, headers=headers)
    assert publish(copied) == 0
    assert waits == [seconds]


def test_a_wait_of_an_hour_is_refused(copied: World, hub: ModelHub, waits: list[float], capsys: Capture) -> None:
    hub.fault("create", 429, headers={"Retry-After": "3600"})
    assert "responded with 429 and asks to wait 3600 s; nothing was sent; run the same" in refused(copied, capsys)
    assert waits == []


def test_a_hub_without_response_times_out(
    copied: World, hub: ModelHub, waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(hub_client, "READ_TIMEOUT_S", 0.5)
    hub.fault("create", SLOW)
    assert publish(copied) == 0
    assert "did not respond in time; again in 1 s (try 2 of 6)" in capsys.readouterr().out
    assert_published_once(hub, copied.newest)


@pytest.mark.parametrize(
    ("step", "kind", "then"),
    [
        ("whoami", 503, "nothing was sent"),
        ("create", 503, "nothing was sent"),
        ("preupload", 503, f"{REPO} exists; nothing was committed"),
        ("put", 503, f"{REPO} exists; nothing was committed"),
        ("commit", LOST, "commit {commit} is in {repo}, neither verified nor tagged"),
        ("tag", DROP, "commit {commit} is in {repo}, verified but not tagged"),
    ],
)
def test_a_failure_reports_the_state_and_the_same_command_resumes(
    copied: World, hub: ModelHub, waits: list[float], capsys: Capture, step: str, kind: str | int, then: str
) -> None:
    hub.fault(step, kind, times=None)
    if step == "commit":  # the commit is made, but the Hub cannot be read afterwards
        hub.faults[0].times = 1
        hub.fault("tree", 503, skip=1, times=None)
        then = "it is not known whether {repo} accepted the commit"
    line = refused(copied, capsys)
    commit = str(hub.repos[REPO].head)[:12] if REPO in hub.repos else ""
    assert f"; {then.format(commit=commit, repo=REPO)}; run the same command again to resume" in line
    assert notes(copied.newest) == []
    hub.faults.clear()
    assert publish(copied) == 0
    assert_published_once(hub, copied.newest)


def test_a_commit_that_cannot_be_verified_is_reported_as_present(
    copied: World, hub: ModelHub, waits: list[float], capsys: Capture
) -> None:
    hub.fault("tree", 503, skip=1, times=None)
    line = refused(copied, capsys)
    assert f"commit {str(hub.repos[REPO].head)[:12]} is in {REPO}, neither verified nor tagged" in line


def test_a_damaged_upload_is_not_tagged(copied: World, hub: ModelHub, capsys: Capture) -> None:
    hub.corrupt = {"README.md", "adapter_model.safetensors"}
    line = refused(copied, capsys)
    assert "has other content than was sent: README.md, adapter_model.safetensors; commit " in line
    assert hub.repos[REPO].tags == {} and notes(copied.newest) == []
    hub.corrupt.clear()
    assert publish(copied) == 0
    assert hub.repos[REPO].tags == {copied.newest.id: hub.repos[REPO].head}


# Permanent failures: one sentence, nothing is sent


def test_an_unknown_token(copied: World, hub: ModelHub, capsys: Capture) -> None:
    hub.users.clear()
    line = refused(copied, capsys)
    assert line.startswith(
        f"{hub.endpoint} does not accept the token; nothing was sent; create one with write perm"
    )
    assert hub.repos == {}


def test_a_read_only_token(copied: World, hub: ModelHub, capsys: Capture) -> None:
    hub.users[TOKEN] = User("me", role="read")
    assert "the token of me may only read; nothing was sent; create one with write permission at" in refused(
        copied, capsys
    )
    assert hub.steps() == ["whoami"]


def test_a_fine_grained_token_without_write_permission(copied: World, hub: ModelHub, capsys: Capture) -> None:
    hub.users[TOKEN] = User("me", role="fineGrained")
    hub.fault("create", 403, times=None)
    assert f"the token of me has no permission to write to {REPO} (403, Forbidden); nothing was" in refused(
        copied, capsys
    )


@pytest.mark.parametrize("private", [None, True, False])
def test_a_repository_of_another_owner(
    copied: World, hub: ModelHub, capsys: Capture, private: bool | None
) -> None:
    if private is not None:
        hub.create("you/ingot", private=private)
    line = refused(copied, capsys, private=False, repo="you/ingot")
    assert line.startswith("namespace you belongs to another owner, and me may not write to you/ingot; ")
    assert line.endswith("name a repository of: me, works\n")
    assert private is None or hub.repos["you/ingot"].published == []


def test_a_model_card_that_the_hub_rejects(
    copied: World, hub: ModelHub, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.deploy.model_card.render_card", lambda *_: "---\na: [\n---\n# no YAML\n")
    line = refused(copied, capsys)
    assert " refuses the request (400, invalid YAML while parsing a flow node " in line
    assert f"; {REPO} exists; nothing was committed; correct the cause, then run the same command" in line


@pytest.mark.parametrize(("step", "status"), [("info", 404), ("commit", 413), ("create", 402), ("tag", 400)])
def test_other_statuses_are_refusals(
    copied: World, hub: ModelHub, capsys: Capture, step: str, status: int
) -> None:
    hub.fault(step, status, times=None)
    refused(copied, capsys)
    assert notes(copied.newest) == []


def test_an_unreachable_hub(
    copied: World, waits: list[float], hub: ModelHub, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    line = refused(copied, capsys)
    assert "cannot be reached (" in line and "; nothing was sent; run the same command again" in line
    assert waits == []


def test_a_server_that_is_not_a_hub(copied: World, hub: ModelHub, capsys: Capture) -> None:
    hub.fault("whoami", 200)
    assert refused(copied, capsys) == (
        f"{hub.endpoint} does not respond like a Hub; nothing was sent; check HF_ENDPOINT\n"
    )


def test_offline_mode_is_respected(
    copied: World, hub: ModelHub, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(copied, capsys) == "HF_HUB_OFFLINE is set; nothing was sent; unset it to publish\n"
    assert hub.requests == []


def test_the_gate_refuses_before_the_hub_is_contacted(copied: World, hub: ModelHub) -> None:
    assert copied.call("publish-hf", "--repo", REPO, "gate.min_delta=2") == 3
    assert hub.requests == []


def test_force_publishes_and_the_card_says_so(copied: World, hub: ModelHub) -> None:
    assert copied.call("publish-hf", "--repo", REPO, "gate.min_delta=2", "gate.verify_examples=0", "--force") == 0
    assert b"published against the gate" in hub.repos[REPO].published[0].files["README.md"]
    assert notes(copied.newest)[0]["promoted"] is False


def test_a_secret_in_the_model_is_not_sent(copied: World, hub: ModelHub, capsys: Capture) -> None:
    (copied.newest.model / "notes.txt").write_text(f"log in with {TOKEN}")
    assert publish(copied) == 3
    assert "the model contains secrets: notes.txt contains the value of HF_TOKEN" in capsys.readouterr().err
    line = refused(copied, capsys, force="true")  # force does not override this
    assert line.startswith("not published: notes.txt contains the value of HF_TOKEN; ")
    assert hub.requests == []


def test_a_run_directory_that_is_not_a_valid_tag(copied: World, hub: ModelHub, capsys: Capture) -> None:
    moved = copied.newest.path.rename(copied.newest.path.with_name("my run"))
    assert "my run is not a valid git tag; nothing was sent; rename" in refused(copied, capsys, moved)
    assert hub.requests == []


# The token


def test_the_token_of_a_login_is_used_and_never_written(
    copied: World, hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    kept = tmp_path / "login" / "token"
    kept.parent.mkdir()
    kept.write_text(TOKEN + "\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(kept))
    assert publish(copied) == 0
    assert_published_once(hub, copied.newest)
    assert TOKEN not in "".join(capsys.readouterr())
    written = [*tree(copied.output).values(), *hub.repos[REPO].published[0].files.values()]
    assert not any(TOKEN.encode() in content for content in written)
    (copied.newest.model / "notes.txt").write_text(TOKEN)
    assert "notes.txt contains the value of HF_TOKEN" in refused(copied, capsys, repo="me/two", force="true")


def test_missing_settings_are_reported_together(assay: AssayCommand) -> None:
    result = assay("publish-hf", forbidden=HEAVY, HF_HOME=str(assay.cwd), HF_ENDPOINT="ftp://me:pw@hub")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "no repository is named; set repo_id=USER/NAME (publish-hf: --repo USER/NAME), or HF_REPO_ID",
        "HF_ENDPOINT is not a plain http(s) address; correct it, or unset it for huggingface.co",
        "no token for the Hub was found; set HF_TOKEN, or run hf auth login",
    ]


@pytest.mark.parametrize(
    "repo", ["ingot", "a/b/c", "me/", "me/in got", "me/-x", "me/a..b", "me/x.git", "m" * 97 + "/x"]
)
def test_a_malformed_repository_name_is_refused_first(
    world: World, hub: ModelHub, capsys: Capture, repo: str
) -> None:
    assert f"repo_id={repo}: should be USER/NAME" in refused(world, capsys, repo=repo)
    assert hub.requests == []


@pytest.mark.parametrize("change", ["unfinished", "no model", "no run"])
def test_an_unpublishable_run_is_refused_before_the_hub_is_contacted(
    copied: World, hub: ModelHub, capsys: Capture, change: str
) -> None:
    path = copied.newest.path
    if change == "unfinished":
        copied.newest.update(status="failed")
    elif change == "no model":
        shutil.rmtree(copied.newest.model)
    else:
        path = copied.model
    refused(copied, capsys, path)
    assert hub.requests == []


# The state of huggingface_hub


def test_the_state_of_huggingface_hub_is_restored(copied: World, hub: ModelHub) -> None:
    from huggingface_hub.utils import get_session

    assert publish(copied) == 0
    assert not isinstance(get_session(), hub_client.HubHttpClient)
    assert constants.HF_HUB_DISABLE_XET is False


@pytest.mark.parametrize(
    ("address", "variable", "disabled"),
    [
        ("https://hub.example.org", None, True),
        ("https://huggingface.co", None, False),
        ("https://hub-ci.huggingface.co", None, False),
        ("https://nothuggingface.co", None, True),
        ("https://hub.example.org", "0", False),
        ("https://hub.example.org", "1", True),
        ("https://huggingface.co", "1", True),
    ],
)
def test_xet_is_used_only_on_huggingface_co(
    hub: ModelHub, monkeypatch: pytest.MonkeyPatch, address: str, variable: str | None, disabled: bool
) -> None:
    if variable is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_XET", variable)
    with hub_client.connected(address, TOKEN):
        assert constants.HF_HUB_DISABLE_XET is disabled
