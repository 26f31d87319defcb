"""The JSON schemas of YAML files: right files are valid, wrong ones are underlined in an editor."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from jsonschema import ValidationError as JsonError
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from src import config, json_schema
from src.aliases import RENAMED
from src.stages import STAGES
from tests.fixtures import ROOT

CONFIGS = ROOT / "configs"
SHIPPED = sorted(p.relative_to(CONFIGS).as_posix() for p in (*CONFIGS.glob("*.yaml"), *CONFIGS.glob("*/*.yaml")))
TRAIN = json_schema.stage_schema("train")


def content(text: str) -> Any:
    """A YAML text as Hydra reads it: 1e-4 is a number."""
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


def problems(schema: Any, text: str) -> list[str]:
    """The settings that are wrong, dotted, and the names that are not settings."""
    return [_wrong_key(error) for error in Draft7Validator(schema).iter_errors(content(text))]


def _wrong_key(error: JsonError) -> str:
    """The deepest setting that an error is about."""
    if error.validator == "additionalProperties":
        return ".".join(map(str, [*error.absolute_path, *re.findall(r"'(\w+)'", error.message)]))
    below = [_wrong_key(e) for e in error.context or ()]
    return max([".".join(map(str, error.absolute_path)), *below], key=lambda key: key.count("."))


# What is valid


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_names_its_schema_and_is_valid(name: str) -> None:
    text = (CONFIGS / name).read_text(encoding="utf-8")
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(.+)$", text, re.MULTILINE)
    schema = ((CONFIGS / name).parent / named).resolve()
    assert schema.stem == (json_schema.PRESET if "/" in name else Path(name).stem)
    assert problems(json.loads(schema.read_text(encoding="utf-8")), text) == []


@pytest.mark.parametrize("stage", STAGES)
def test_the_record_of_a_run_is_valid_for_its_stage_and_as_a_preset(stage: str) -> None:
    record = config.to_yaml(config.load(stage, {}))
    for schema in (json_schema.stage_schema(stage), json_schema.preset_schema()):
        Draft7Validator.check_schema(schema)
        assert problems(schema, record) == []


def test_the_records_of_the_last_version_are_valid() -> None:
    with tarfile.open(ROOT / "tests" / "last_version.tar.xz") as archive:
        files = [archive.extractfile(m) for m in archive.getmembers() if m.name.endswith("/config_used.yaml")]
        assert [problems(json_schema.preset_schema(), file.read().decode()) for file in files if file] == [[]] * 5


@pytest.mark.parametrize(
    "line",
    [
        "lr: ${oc.env:LR}", "lr: 1e-4", "data_source: ${other}", "datasets: [{path: a, weight: '${lr}'}]",
        "cuda_visible_devices: 0", "model_revision: 1234567", "report_to: wandb", "report_to: none", "bf16: ${x}",
        "report_to: [mlflow, wandb]", "report_to: null", "lora_target_modules: all-linear", "partition: gpu",
        "lora_target_modules: null", "peft: {alpha_pattern: {q_proj: 8}}", "near_threshold: 0.7",
        "search: {trials: 3, space: {lr: 'interval(1, 2)'}}", "defaults: [_self_]", "hydra: {mode: MULTIRUN}",
    ],
)  # fmt: skip
def test_what_a_training_run_accepts_is_valid(line: str) -> None:
    assert problems(TRAIN, line) == []


# What is not


@pytest.mark.parametrize(
    ("stage", "line", "key"),
    [
        ("train", "epochz: 1", "epochz"),
        ("train", "lr: abc", "lr"),
        ("train", "lr: 0", "lr"),
        ("train", "lr: true", "lr"),
        ("train", "bf16: maybe", "bf16"),
        ("train", "batch_size: 2.5", "batch_size"),
        ("train", "method: lorra", "method"),
        ("train", "report_to: wandbb", "report_to"),
        ("train", "lora_target_modules: []", "lora_target_modules"),
        ("train", "data_source: {tipe: s3}", "data_source.tipe"),
        ("train", "datasets: [{path: a, formt: text}]", "datasets.0.formt"),
        ("train", "search: {trails: 3}", "search.trails"),
        ("eval", "epochs: 1", "epochs"),
        ("eval", "search: {trials: 3}", "search"),
        ("publish", "gate: {min_delt: 1}", "gate.min_delt"),
        ("publish", "gate: {guards: [{splt: test}]}", "gate.guards.0.splt"),
    ],
)
def test_what_is_wrong_is_named(stage: str, line: str, key: str) -> None:
    assert problems(json_schema.stage_schema(stage), line) == [key]


VALUES: list[Any] = [
    None, True, -1, 0, 1, 7, 0.5, 1.5, 1000, "auto", "x", "", [], ["x"], [1], {}, {"x": 1}, {"type": "s3"}, [{}],
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_the_schema_and_the_settings_agree_on_every_value(stage: str) -> None:
    """Except for true as a number, which another rule refuses, and for texts and numbers that Python converts."""
    schema, settings = json_schema.stage_schema(stage), config.schema_of(stage)
    adapter = TypeAdapter(settings)
    disagreements = []
    for key in {key.split(".")[0] for key in config.flat_keys(settings)}:
        validator = Draft7Validator(schema["properties"][key] | {"definitions": schema["definitions"]})
        for value in VALUES:
            try:
                adapter.validate_python(config.with_lists(settings, {key: value}))
                accepted = True
            except ValidationError:
                accepted = False
            converted = value is True or (value in (0, 1) and validator.is_valid(True))
            if accepted != validator.is_valid(value) and not converted:
                disagreements.append((key, value, accepted))
    assert disagreements == []


def test_every_former_name_is_deprecated_where_its_setting_is() -> None:
    settings = json_schema.preset_schema()["properties"]
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        properties = settings[group]["anyOf"][0]["properties"] if group else settings
        assert properties[name]["deprecated"] and properties[name]["description"] == f"{old} is now {new}"


def test_a_setting_has_its_meaning_and_its_default() -> None:
    lr = TRAIN["properties"]["lr"]
    assert (lr["description"], lr["default"]) == ("peak learning rate", config.defaults("train")["lr"])
    assert all(node.get("description") for node in TRAIN["properties"].values())


def test_the_command_prints_the_schema_of_a_stage(assay: Any) -> None:
    assert json.loads(assay("schema", "eval").stdout) == json_schema.stage_schema("eval")
    assert json.loads(assay("schema").stdout) == json_schema.preset_schema()
    done = assay("schema", "trian")
    assert done.returncode == 2 and "trian is not a stage; did you mean train?" in done.stderr


# In an editor

WRONG = """# yaml-language-server: $schema={schema}
lr: -1
epochz: 2
gate: {{split: test, metrc: 1}}
target: hub
seed: ${{oc.env:SEED}}
"""


class EditorServer:
    """yaml-language-server, with the messages that an editor would send to it."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen([command, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def send(self, **message: Any) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.process.stdin.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout
        while header := self.process.stdout.readline():
            length = int(header.split(b":")[1]) if header.lower().startswith(b"content-length") else 0
            while self.process.stdout.readline().strip():
                pass
            message = json.loads(self.process.stdout.read(length))
            if "id" in message and "method" in message:  # it asks for settings: there are none
                self.send(id=message["id"], result=[{} for _ in message["params"].get("items", [])])
            yield message

    def underlined(self, file: Path) -> list[tuple[int, str]]:
        """The lines that are underlined, from 0, with what the editor says."""
        self.send(id=1, method="initialize", params={"processId": None, "rootUri": None, "capabilities": {}})
        next(m for m in self.messages() if m.get("id") == 1 and "result" in m)
        self.send(method="initialized", params={})
        document = {"uri": file.as_uri(), "languageId": "yaml", "version": 1, "text": file.read_text()}
        self.send(method="textDocument/didOpen", params={"textDocument": document})
        found = next(m for m in self.messages() if m.get("method") == "textDocument/publishDiagnostics")
        return sorted((d["range"]["start"]["line"], d["message"]) for d in found["params"]["diagnostics"])


def test_an_editor_underlines_what_is_wrong(tmp_path: Path) -> None:
    command = shutil.which("yaml-language-server")
    if not command:
        pytest.skip("yaml-language-server is not installed: npm install -g yaml-language-server")
    file = tmp_path / "mine.yaml"
    file.write_text(WRONG.format(schema=CONFIGS / "schemas" / "publish.json"))
    server = EditorServer(command)
    try:
        found = server.underlined(file)
    finally:
        server.process.kill()
        server.process.wait()
        assert server.process.stdin and server.process.stdout
        server.process.stdin.close()
        server.process.stdout.close()
    assert [line for line, _ in found] == [1, 2, 3, 5], found
    assert found[1][1] == "Property epochz is not allowed." and "metrc" in found[2][1]
