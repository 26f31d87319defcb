"""From words to one configuration: precedence, files of one's own, sweeps, secrets, round trips."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import aliases, cli, cli_args, config, schema
from src.errors import ConfigError, UserError
from src.main import main
from src.stages import STAGES

SECRET = "hf_correct_horse_battery"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, and an environment that is put back."""
    for name in ("CUDA_VISIBLE_DEVICES", "HF_REPO_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def parsed(stage: str, *words: str) -> cli_args.Call:
    """The parsed command line."""
    return cli_args.parse(stage, list(words))


def jobs(stage: str, *words: str) -> list[Any]:
    """The configuration of each job that the words start."""
    started: list[Any] = []
    cli.run_jobs(parsed(stage, *words), started.append)
    return started


def one(stage: str, *words: str) -> Any:
    (job,) = jobs(stage, *words)
    return job


def problems(stage: str, *words: str) -> list[str]:
    """The problems of wrong words; no job may have started."""
    started: list[Any] = []
    with pytest.raises(ConfigError) as caught:
        cli.run_jobs(parsed(stage, *words), started.append)
    assert started == []
    return list(caught.value.problems)


@pytest.fixture
def all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every GPU that is named responds."""
    monkeypatch.setattr("src.gpus.missing", lambda visible: [])


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


# Precedence


@pytest.fixture
def own(elsewhere: None) -> list[str]:
    """A folder of configurations that all set `seed`, each to its own number."""
    write("own/mine.yaml", "seed: 1\n")
    write("own/model/mine.yaml", "# @package _global_\nseed: 2\n")
    write("own/experiment/mine.yaml", "# @package _global_\nseed: 3\n")
    return ["--config-path", "own", "--config-name", "mine"]


def test_the_file_wins_over_the_schema(own: list[str]) -> None:
    assert schema.TrainConfig().seed == 42
    assert one("train", *own).seed == 1


def test_a_preset_wins_over_the_file(own: list[str]) -> None:
    assert one("train", *own, "model=mine").seed == 2


def test_an_experiment_wins_over_the_file_and_over_presets_that_it_chooses(own: list[str]) -> None:
    assert one("train", *own, "experiment=mine").seed == 3
    write("own/experiment/other.yaml", "# @package _global_\ndefaults:\n  - override /model: mine\nlr: 0.5\n")
    assert one("train", *own, "experiment=other").seed == 2
    write(
        "own/experiment/both.yaml",
        "# @package _global_\ndefaults:\n  - override /model: mine\n  - _self_\nseed: 6\n",
    )
    assert one("train", *own, "experiment=both").seed == 6


@pytest.mark.parametrize("name", ["both", "both.yaml"])
def test_a_typed_preset_wins_over_an_experiment(own: list[str], name: str) -> None:
    text = "# @package _global_\ndefaults:\n  - override /method: full\n  - _self_\nmethod: full\nepochs: 5\n"
    write("own/experiment/both.yaml", text + "seed: 6\n")
    write("both.yaml", text + "seed: 6\n")
    found = one("train", *own, f"experiment={name}", "method=lora", "model=mine")
    assert (found.method, found.seed, found.epochs) == ("lora", 2, 5)
    two = jobs("train", *own, f"experiment={name}", "--multirun", "method=lora,dora")
    assert [(job.method, job.seed) for job in two] == [("lora", 6), ("dora", 6)]


@pytest.mark.parametrize(
    ("below", "typed", "expected"),
    [
        ("max_steps: 7", "epochs=2", (2, None)),
        ("max_steps: 7\nepochs: 4", "lr=0.1", (4, 7)),
        ("max_steps: 7", "max_steps=9", (1, 9)),
    ],
)
def test_a_setting_that_another_would_overrule_wins_if_it_is_typed(
    below: str, typed: str, expected: tuple[float, int | None]
) -> None:
    write("mine.yaml", f"# @package _global_\n{below}\n")
    found = one("train", "experiment=mine.yaml", typed)
    assert (found.epochs, found.max_steps) == expected


def test_a_typed_folder_wins_over_datasets_of_a_preset() -> None:
    assert one("train", "data=mixed", "dataset_path=mine").datasets == []
    assert one("train", "data=mixed").datasets
    write("mine.yaml", "# @package _global_\ndatasets: [{path: a}]\n")
    assert one("train", "experiment=mine.yaml", "data=example_text").datasets == []


def test_the_command_line_wins_over_everything(own: list[str]) -> None:
    assert one("train", "seed=4", *own, "experiment=mine", "model=mine").seed == 4


def test_of_two_words_the_last_wins() -> None:
    assert one("train", "seed=4", "seed=5").seed == 5


@pytest.mark.parametrize("word", ["seed=4", "+seed=4", "++seed=4"])
def test_every_way_to_write_an_override_means_the_same(word: str) -> None:
    assert one("train", word).seed == 4


def test_shipped_presets_apply_to_files_of_a_user(own: list[str]) -> None:
    found = one("train", *own, "method=full", "hardware=cpu")
    assert (found.method, found.lr, found.cuda_visible_devices) == ("full", 2e-5, "")


# Files


@pytest.mark.parametrize(
    "words",
    [
        ["--config-name", "some folder/mine.yaml"],
        ["--config-name=some folder/mine.yaml"],
        ["-cn", "some folder/mine.yaml"],
        ["--config-path", "some folder", "--config-name", "mine"],
        ["-cp", "some folder", "-cn", "mine"],
    ],
)
def test_a_file_is_named_by_its_path_or_by_folder_and_name(words: list[str]) -> None:
    write("some folder/mine.yaml", "seed: 7\n")
    assert one("train", *words).seed == 7


def test_a_missing_file_is_answered_with_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"no configuration trian in .*; did you mean train\?"):
        cli_args.parse("train", ["--config-name", "trian"])


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        (
            b"seed: 1\n\t- lr",
            "cannot be read as YAML: found character '\\t' that cannot start any token at line 2",
        ),
        (
            b"seed: [1\n",
            "cannot be read as YAML: expected ',' or ']', but got '<stream end>' at line 2, column 1",
        ),
        (b"\xff\xfe", "cannot be read as YAML: 'utf-8' codec can't decode byte 0xff in position 0"),
        (b"- seed\n", "holds a list instead of settings; write key: value"),
    ],
)
def test_an_invalid_file_is_one_sentence(content: bytes, reported: str) -> None:
    Path("mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        cli_args.parse("train", ["--config-name", "mine.yaml"])
    assert f"/mine.yaml {reported}" in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_file_and_one_with_a_byte_order_mark_are_settings() -> None:
    for content in (b"", b"\xef\xbb\xbfseed: 42\r\n"):
        Path("mine.yaml").write_bytes(content)
        assert one("train", "--config-name", "mine.yaml").seed == 42


def test_an_invalid_preset_of_a_user_is_one_sentence() -> None:
    write("mine/train.yaml", "seed: 7\n")
    write("mine/experiment/broken.yaml", "# @package _global_\nseed: [1\n")
    with pytest.raises(ConfigError, match=r"^\S*/broken.yaml cannot be read as YAML: expected .* at line 3"):
        one("train", "-cp", "mine", "experiment=broken")


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        cli_args.parse("train", ["--config-path", "nowhere"])


def test_a_flag_without_its_file_is_named() -> None:
    with pytest.raises(ConfigError, match="--config-name needs a value"):
        cli.run_jobs(cli_args.parse("train", ["--config-name"]), lambda _: 0)


def test_wrong_settings_of_a_file_and_of_the_command_line_are_reported_together() -> None:
    write("mine.yaml", "epochz: 2\ndata_source:\n  tipe: local\n")
    assert sorted(problems("train", "--config-name", "mine.yaml", "lr=abc")) == [
        "data_source.tipe is not a setting; did you mean data_source.type?",
        "epochz is not a setting; did you mean epochs?",
        "lr=abc: should be a number",
    ]


# The snapshot of a run repeats the run


def test_the_snapshot_of_a_training_run_repeats_it(all_gpus: None) -> None:
    words = [
        "experiment=smoke", "method=dora", "lr=1e-05", "max_steps=3", "lora_target_modules=null", "epochs=0.5",
        "dataset_path='./my données: 100% #1'", "peft.alpha_pattern={q_proj: 8, a.b: 4}",
        "trainer.dataloader_num_workers=2", "model_revision=1234567", "cuda_visible_devices='0,1'",
    ]  # fmt: skip
    first = one("train", *words)
    write("run/config_used.yaml", config.to_yaml(first))
    assert one("train", "--config-name", "run/config_used.yaml") == first
    assert list(yaml.safe_load(Path("run/config_used.yaml").read_text(encoding="utf-8"))) == list(asdict(first))


def test_the_snapshot_of_a_commit_that_looks_like_a_number_stays_text() -> None:
    first = one("train", "model_revision='12e4567'")
    assert first.model_revision == "12e4567"
    write("config_used.yaml", config.to_yaml(first))
    assert one("train", "--config-name", "config_used.yaml") == first


def test_a_typed_commit_that_looks_like_a_number_stays_text() -> None:
    assert one("train", "model_revision=12e4567").model_revision == "12e4567"


@pytest.mark.parametrize("typed", ["it's", "it's é #1", "a=b", "{x", "'quoted' and not", "12e4567"])
def test_text_that_hydra_cannot_parse_is_used_as_typed(typed: str) -> None:
    assert one("data-push", f"message={typed}").message == typed
    assert one("train", "data_source.type=lakefs", f"data_source.commit={typed}").data_source.commit == typed


@pytest.mark.parametrize("stage", ["eval", "eval-baseline"])
def test_the_snapshot_of_an_evaluation_repeats_it(stage: str) -> None:
    first = one(stage, "splits=[test]", "generation={do_sample: true, temperature: 0.7}", "max_examples=3")
    write("run/config_used.yaml", config.to_yaml(first))
    assert one(stage, "--config-name", "run/config_used.yaml") == first


def test_a_snapshot_holds_a_reference_where_a_secret_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    first = one("train", f"model_name=https://user:{SECRET}@example.org/x")
    assert first.model_name == f"https://user:{SECRET}@example.org/x"
    write("config_used.yaml", config.to_yaml(first))
    assert SECRET not in Path("config_used.yaml").read_text(encoding="utf-8")
    assert one("train", "--config-name", "config_used.yaml") == first


# Words


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["epochs"], "epochs is not an override; write key=value"),
        (["--epochs", "lr=1"], "--epochs is not a flag of train"),
        (["--repo", "x/y"], "--repo is not a flag of train"),
        (["--cfg"], "--cfg needs a value"),
        (["--cfg", "job", "-m"], "--cfg prints one configuration, and --multirun makes several"),
        (["=3"], "=3 is not an override; write key=value"),
        (["lr=[1"], "lr=[1 cannot be read as key=value"),
        (["method=qlorra"], "method=qlorra is not a preset; did you mean qlora?"),
        (["model=llama"], "model=llama is not a preset"),
        (["experiment=smoke,smok", "-m"], "experiment=smok is not a preset; did you mean smoke?"),
        (["launch=x"], "launch=x is not a preset; there are: slurm"),
        (["lora_r=${nope}"], "there is no setting nope"),
        (["hydra.nope=1"], "hydra.nope"),
        (["x.y.z=3"], "x is not a setting"),
    ],
)
def test_invalid_words_are_named(words: list[str], sentence: str) -> None:
    (reported,) = [p for p in problems("train", *words) if sentence in p]
    assert reported


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("stop=[<|im_end|>]", ["<|im_end|>"]),
        ('stop=[#a, <b, "c, d", it\'s]', ["#a", "<b", "c, d", "it's"]),
        ("stop=</s>", ["</s>"]),
    ],
)
def test_texts_of_a_list_need_no_quotes(word: str, value: list[str]) -> None:
    assert one("eval", word).stop == value


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("stop=['a]", """write 'stop=["a"]'"""),
        ("stop=[<a>", """write 'stop=["<a>"]'"""),
        ("stop=[a,,<b>]", """write 'stop=[a, "<b>"]'"""),
        ("generation={top_k: <b>}", """write 'generation={top_k: "<b>"}'"""),
        ("generation={a: [#1, 2}", """write 'generation={a: ["#1", 2]}'"""),
        ("stop={a: b}", "stop={'a': 'b'}: should be a list"),
        ("gate=[a]", "gate=['a']: is a group of settings; set for example gate.metric"),
        ("seed=1;", "seed=1;: should be a valid integer"),
        ("a b=1", "a b=1 cannot be read as key=value"),
    ],
)
def test_a_value_that_cannot_be_read_is_answered_with_the_word_that_can(word: str, remedy: str) -> None:
    (reported,) = problems("eval", word)
    assert remedy in reported
    if remedy.startswith("write"):
        corrected = shlex.split(reported.partition("; write ")[2])[0]
        assert cli.compose.prepare_overrides(parsed("eval", corrected))[1] == []


def test_a_text_with_commas_is_no_sweep() -> None:
    words = ["--multirun", "system_prompt=Be kind, and brief", "user_prompt={question},{context}"]
    found = jobs("train", *words, "lr=1e-3,1e-4", "run_name=a,b")
    assert {(job.system_prompt, job.user_prompt) for job in found} == {
        ("Be kind, and brief", "{question},{context}")
    }
    assert [(job.lr, job.run_name) for job in found] == [(1e-3, "a"), (1e-3, "b"), (1e-4, "a"), (1e-4, "b")]
    two = jobs("train", "--multirun", "system_prompt=choice('Be kind, and brief','No')")
    assert [job.system_prompt for job in two] == ["Be kind, and brief", "No"]


@pytest.mark.parametrize(
    "words",
    [["eval", "a" * 300], ["eval", f"gate.metric={'a' * 300}", "a" * 300], ["report", f"output_dir={'é' * 150}"],
     ["train", f"output_dir=x/{'a' * 300}"], ["train", "--config-name", "a" * 300], ["runs", "a" * 300]],
)  # fmt: skip
def test_a_word_that_is_too_long_for_a_file_is_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    reported = capsys.readouterr().err
    assert "300 bytes" in reported or ("3" in reported.split("bytes")[0] and "Traceback" not in reported)


def test_a_group_set_to_null_is_no_crash() -> None:
    try:
        assert one("train", "method=null") == one("train")
    except ConfigError as error:
        assert "method" in str(error)


def test_wrong_words_and_wrong_settings_are_reported_together() -> None:
    reported = problems("train", "--foo", "bar", "method=nope", "epochz=1")
    assert [t.split()[0] for t in reported] == ["--foo", "bar", "method=nope", "epochz"]


def test_an_unresolved_reference_and_wrong_settings_are_reported_together() -> None:
    reported = problems("train", "lora_r=${nope}", "epochz=1")
    assert [t.split()[0] for t in reported if "epochz" in t or "lora_r" in t] == ["lora_r", "epochz"]


def test_a_deleted_setting_falls_back_to_the_schema(own: list[str]) -> None:
    assert one("train", *own, "~seed").seed == 42


@pytest.mark.parametrize(
    "path",
    [
        "outputs/runs/latest",
        "my runs/it's here",
        'a "b" c',
        "a,b",
        "[{(x)}]",
        "é #%&;",
        "ends with \\",
        "it's a\\b",
    ],
)
def test_the_model_path_is_used_as_it_is(path: str) -> None:
    assert one("eval", path).model_path == path


def test_two_runs_keep_their_order() -> None:
    found = one("compare", "2026-01-15_10-30-45", "runs/it's here")
    assert (found.run_a, found.run_b) == ("2026-01-15_10-30-45", "runs/it's here")
    assert (one("compare").run_a, one("compare").run_b) == ("latest", "baseline")
    assert problems("compare", "a", "b", "c") == ["c is not an override; write key=value"]


def test_training_takes_no_model_path() -> None:
    assert problems("train", "outputs/runs/latest") == ["outputs/runs/latest is not an override; write key=value"]


def test_the_hub_flags_set_settings() -> None:
    found = one("publish-hf", "run/x", "--repo", "a/b", "--public", "--force")
    assert (found.model_path, found.repo_id, found.private, found.force) == ("run/x", "a/b", False, True)
    plain = one("publish-hf", "--repo=a/b")
    assert (plain.model_path, plain.repo_id, plain.private, plain.force) == (None, "a/b", True, False)


def test_only_the_hub_has_hub_flags() -> None:
    assert [t.split()[0] for t in problems("publish", "--repo", "--public")] == ["--repo", "--public"]
    assert one("publish", "--force").force is True


def test_a_secret_on_the_command_line_becomes_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    call = cli_args.parse("publish", [f"publish_name=x-{SECRET}", SECRET, f"gate={{metric: {SECRET}}}"])
    assert SECRET not in str(call)
    assert call.overrides[0] == "publish_name=x-${oc.env:MY_TOKEN}"
    found = one("publish", f"publish_name=x-{SECRET}", SECRET)
    assert (found.publish_name, found.model_path) == (f"x-{SECRET}", SECRET)


def test_an_error_about_a_secret_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    assert main(["train", f"lr={SECRET}", SECRET, f"--{SECRET}"]) == 2
    reported = capsys.readouterr().err
    assert SECRET not in reported
    assert "lr=${oc.env:MY_TOKEN}: should be a number" in reported


# Sweeps


def test_a_sweep_is_one_job_for_each_combination() -> None:
    found = jobs("train", "-m", "seed=1,2", "method=lora,dora", "lr=0.5")
    assert [(c.seed, c.method, c.lr) for c in found] == [
        (1, "lora", 0.5), (1, "dora", 0.5), (2, "lora", 0.5), (2, "dora", 0.5),
    ]  # fmt: skip


def test_a_typed_method_wins_over_that_of_the_hardware_preset() -> None:
    assert one("train", "hardware=gpu_24gb").method == "qlora"
    assert one("train", "method=dora", "hardware=gpu_24gb").method == "dora"


@pytest.mark.parametrize("stage", ["train", "check-data"])
def test_the_problems_of_a_method_are_reported_with_the_rest(stage: str) -> None:
    reported = problems(stage, "method=full", "peft.r=3", "lr=abc")
    assert reported == [
        "lr=abc: should be a number",
        "peft: {...} is not supported with method=full, which has no adapter; remove it",
    ]


def test_a_range_is_a_sweep() -> None:
    assert [c.seed for c in jobs("train", "--multirun", "seed=range(1,4)")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["seed=1,2,-3"], "seed=-3: should be greater than or equal to 0"),
        (["seed=range(-1,2)"], "seed=-1: should be greater than or equal to 0"),
        (
            ["method=lora,dora,nope"],
            "method=nope is not a preset; there are: adalora, dora,",
        ),
        (["method=lora,full", "peft.alpha_pattern={x: 1}"], "peft: {...} is not supported with method=full"),
        (["seed=1,2", "epochz=1"], "epochz is not a setting; did you mean epochs?"),
    ],
)
def test_a_sweep_with_one_bad_job_starts_none(words: list[str], sentence: str) -> None:
    (reported,) = problems("train", "-m", *words)
    assert reported.startswith(sentence)
    assert list(Path().iterdir()) == []


def test_a_sweep_without_its_flag_is_refused_with_both_remedies() -> None:
    for word in ("lr=0,0003", "lora_target_modules=q_proj,v_proj", "method=lora,dora"):
        key, values = word.split("=")
        (reported,) = problems("train", word)
        remedy = f"write {key}=[{values}] for a list, or --multirun for a job each"
        assert reported == f"{word} is several values; {remedy}"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["learning_rate=1e-4"], "learning_rate is not a setting; did you mean lr?"),
        (["--learning_rate=1e-4"], "--learning_rate is not a flag of train; write lr=1e-4"),
        (["--lora-r", "lr=1"], "--lora-r is not a flag of train; write lora_r=VALUE"),
        (["--nonsense"], "--nonsense is not a flag of train"),
        (["--load_in_4bit"], "--load_in_4bit is not a flag of train; write method=qlora"),
        (["--template=x"], "--template is not a flag of train; write chat_template=x"),
        (["val_size=0.1"], "val_size is not a setting; did you mean eval_split?"),
        (["wandb_project=x"], "wandb_project is not a setting; set the environment variable WANDB_PROJECT"),
        (["report_to=true"], "report_to=True: should be a list, as [True]"),
        (["dataset_path="], "dataset_path=: should not be empty"),
        (["chat_templates=alpaca"], "chat_templates is not a setting; did you mean chat_template?"),
        (["data_source=lakefs"], "data_source=lakefs: is a group of settings; set for example data_source.type"),
    ],
)
def test_names_of_other_tools_are_answered_with_the_setting(words: list[str], sentence: str) -> None:
    assert problems("train", *words) == [sentence]


def test_every_name_of_another_tool_leads_to_a_setting() -> None:
    keys = {key for name in STAGES for key in config.flat_keys(config.schema_of(name))}
    named = {name: ours.partition("=")[0] for name, ours in aliases.OTHER_TOOLS.items()}
    assert {n for n, ours in named.items() if ours not in keys and ours.partition(".")[0] not in keys} == set()
    assert not (named.keys() | aliases.ELSEWHERE.keys()) & keys


# What a person types who copies a configuration of LLaMA-Factory, of Axolotl, and of TRL.
COPIED = """
model_name_or_path template finetuning_type lora_target lora_rank dataset dataset_dir cutoff_len val_size
per_device_train_batch_size learning_rate num_train_epochs overwrite_output_dir preprocessing_num_workers do_train
stage quantization_bit flash_attn fp16 warmup_steps resume_from_checkpoint neat_packing enable_liger_kernel
base_model adapter load_in_4bit sequence_len sample_packing micro_batch_size num_epochs optimizer lr_scheduler
val_set_size lora_target_linear wandb_project wandb_entity train_on_inputs evals_per_epoch saves_per_epoch
flash_attention deepspeed fsdp dataset_prepared_path
dataset_name max_seq_length use_peft completion_only_loss eval_strategy save_strategy attn_implementation
gradient_clipping push_to_hub dataset_num_proc logging_dir
"""
SAME_NAMES = """
output_dir logging_steps save_steps eval_steps gradient_accumulation_steps lr_scheduler_type warmup_ratio bf16 seed
lora_alpha lora_dropout lora_r gradient_checkpointing packing optim max_grad_norm weight_decay report_to run_name
trust_remote_code neftune_noise_alpha early_stopping_patience tf32 datasets max_length max_steps save_total_limit
chat_template chat_template_kwargs
"""


def test_a_copied_configuration_is_answered_name_by_name() -> None:
    reported = problems("train", *(f"{name}=1" for name in COPIED.split()))
    assert [r for r in reported if r.endswith(" is not a setting")] == []
    assert sum(" is not a setting; " in r for r in reported) == len(COPIED.split())
    assert set(SAME_NAMES.split()) <= config.flat_keys(schema.TrainConfig).keys()


def test_a_list_of_gpus_needs_no_quotes(all_gpus: None) -> None:
    assert one("train", "cuda_visible_devices=0,1").cuda_visible_devices == "0,1"


def test_a_typed_gpu_that_does_not_respond_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.utils.environment.gpus", lambda visible: ["a GPU"] if visible == "0" else [])
    fact = "cuda_visible_devices=0,3: this machine has no GPU 3; name GPUs of this machine"
    assert [p[: len(fact)] for p in problems("train", "cuda_visible_devices=0,3")] == [fact]
    assert one("train", "cuda_visible_devices=0").cuda_visible_devices == "0"
    assert one("plan", "cuda_visible_devices=0,3", "plan_device=cuda").plan_device == "cuda"


@pytest.mark.parametrize(
    ("text", "variable", "warns"),
    [("", None, False), ('cuda_visible_devices: "0"', None, True), ('cuda_visible_devices: "0,1"', None, True),
     ('cuda_visible_devices: ${oc.env:CUDA_VISIBLE_DEVICES,"0"}', None, False), ("", "0", True),
     ('cuda_visible_devices: ${oc.env:CUDA_VISIBLE_DEVICES,"0"}', "1", True)],
)  # fmt: skip
def test_a_gpu_that_a_file_or_the_environment_names_is_warned_of_if_it_does_not_respond(
    text: str,
    variable: str | None,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The default, GPU 0, is not a wish."""
    monkeypatch.setattr("src.utils.environment.gpus", lambda visible: [])
    if variable:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    write("mine.yaml", text + "\nseed: 1\n")
    assert one("train", "--config-name", "mine.yaml").seed == 1
    assert ("warning: cuda_visible_devices=" in capsys.readouterr().err) is warns


def test_a_refused_job_ends_the_jobs_of_a_stage_that_has_no_trials() -> None:
    started = []

    def task(cfg: Any) -> int:
        started.append(cfg.seed)
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        cli.run_jobs(cli_args.parse("eval", ["-m", "seed=1,2"]), task)
    assert started == [1]


def test_the_configuration_is_printed_without_starting_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs("train", "--cfg", "job", "seed=7") == []
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 7 and list(shown) == list(config.defaults("train"))


def test_a_job_leaves_nothing_of_hydra_on_disk() -> None:
    one("train")
    assert list(Path().iterdir()) == []


# Jobs of a cluster


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launch=slurm", "partitoin=gpu"], "partitoin is not a setting; did you mean partition?"),
        (["partition=gpu"], "partition=gpu is only supported with launch=slurm"),
        (["launch=slurm", "timeout_min=0"], "timeout_min=0: should be greater than or equal to 1"),
        (["launch=slurm", "-m", "qos=a,b"], "qos cannot differ between the jobs of a command"),
        (["launch=slrum"], "launch=slrum is not a preset; did you mean slurm?"),
    ],
)
@pytest.mark.parametrize("stage", ["train", "eval"])
def test_a_wrong_slurm_setting_is_refused_before_anything_is_submitted(
    stage: str, words: list[str], sentence: str
) -> None:
    (reported,) = problems(stage, *words)
    assert reported.startswith(sentence)


def test_slurm_without_sbatch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        UserError, match="launch=slurm needs sbatch, which is not installed on this machine; run the"
    ):
        jobs("train", "launch=slurm")
    assert not Path("outputs").exists()


def test_slurm_settings_are_not_settings_of_a_run() -> None:
    assert not set(schema.SLURM_KEYS) & {key for s in STAGES for key in config.flat_keys(config.schema_of(s))}
    assert config.run_settings("eval", {"qos": "a", "splits": ["dev"]}) == {"splits": ["dev"]}
