"""The settings of every stage: small dataclasses, mixed into one flat configuration per stage.

A function takes the mixin that it needs, not the configuration of a stage. Each setting has its type, its range,
its default and, in `Doc`, its meaning: `--help` and docs/settings.md are generated from them. A choice that is an
entry of a table (a method, a loss, a format ...) is also named here, in a `Literal`; tests compare both.

Two mixins must not share a field name, since Python would merge them silently; a test refuses it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Len
from pydantic import ConfigDict, Strict
from typing_extensions import Doc

DEFAULT_GPUS = "0"
DEMO_MODEL = "models/SmolLM2-135M-Instruct"

Bf16 = bool | Literal["auto"]
Task = Literal["causal_lm", "seq2seq", "classification"]
Fraction = Interval(ge=0, le=1)
Names = Annotated[list[str], Len(1)]


@dataclass
class ModelArgs:
    model_name: Annotated[str, Len(1), Doc("Hub id or local folder of the base model")] = DEMO_MODEL
    model_revision: Annotated[str | None, Doc("branch, tag or commit on the Hub; null: main")] = None
    task: Annotated[
        Task,
        Doc("causal_lm continues a text; seq2seq turns an input into an output; classification picks a label"),
    ] = "causal_lm"


@dataclass
class InitArgs:
    init_from: Annotated[
        Annotated[str, Len(1)] | None,
        Doc(
            "tuned model that a new run goes on from: a run, latest, a model folder, or an adapter on the Hub "
            "(USER/NAME or USER/NAME@REVISION); its base model, method and rank are taken from it"
        ),
    ] = None


@dataclass
class ChatArgs:
    """How conversations are rendered as text."""

    chat_template: Annotated[
        Annotated[str, Len(1)] | None,
        Doc("chat template: a file PATH.jinja, or a name that list-configs shows; null: that of the tokenizer"),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any], Doc("variables of the chat template, e.g. {enable_thinking: false}; those of a row win")
    ] = field(default_factory=dict)
    empty_thoughts: Annotated[
        EmptyThoughts,
        Doc(
            "the empty think block that a template writes before an answer without thoughts: part of the prompt "
            "(context), or of the answer, with loss"
        ),
    ] = "context"


@dataclass
class TrustArgs:
    trust_remote_code: Annotated[bool, Doc("allow Python code from the model repository to run")] = False


@dataclass
class PrecisionArgs:
    bf16: Annotated[
        Bf16, Doc("true: bfloat16; false: fp16 on a GPU, fp32 on a CPU; auto: bfloat16 if native to the device")
    ] = "auto"


@dataclass
class DataSource:
    """Where data files come from. SOURCE_KEYS lists the keys that each type reads."""

    type: Annotated[Literal["local", "lakefs", "hub", "url", "s3"], Doc("kind of data source")] = "local"
    endpoint: Annotated[
        str | None, Doc("server of lakeFS, the Hub or S3; null: the one in the environment, else the public one")
    ] = None
    repo: Annotated[str | None, Doc("lakeFS repository, or dataset id on the Hub")] = None
    branch: Annotated[str | None, Doc("lakeFS branch; the run records its commit; null: main")] = None
    tag: Annotated[str | None, Doc("lakeFS tag instead of a branch")] = None
    commit: Annotated[str | None, Doc("lakeFS commit instead of a branch")] = None
    revision: Annotated[str | None, Doc("branch, tag or commit on the Hub; null: main")] = None
    bucket: Annotated[str | None, Doc("S3 bucket")] = None
    path: Annotated[str, Doc("folder in the repository or bucket")] = ""
    url: Annotated[str | None, Doc("http(s) URL of one file")] = None
    sha256: Annotated[str | None, Doc("expected SHA-256 of the downloaded file")] = None
    max_gb: Annotated[float, Gt(0), Doc("download limit in GB")] = 100
    allow_private: Annotated[bool, Doc("allow URLs that resolve to a private network address")] = False


SOURCE_KEYS: dict[str, set[str]] = {
    "local": set(),
    "lakefs": {"endpoint", "repo", "branch", "tag", "commit", "path", "max_gb"},
    "hub": {"endpoint", "repo", "revision", "path", "max_gb"},
    "url": {"url", "sha256", "max_gb", "allow_private"},
    "s3": {"endpoint", "bucket", "path", "max_gb"},
}

DataFormat = Literal[
    "auto",
    "messages",
    "prompt_completion",
    "instruction",
    "conversations",
    "message_tree",
    "classification",
    "text",
]
Strategy = Literal["QA", "Chat"]
TrainOn = Literal["completion", "last_turn", "all"]
OnOverlength = Literal["reject", "truncate_prompt", "truncate", "split"]
OnDisputedMask = Literal["reject", "warn"]
EmptyThoughts = Literal["context", "loss"]


@dataclass
class ColumnArgs:
    strategy: Annotated[
        Strategy | None,
        Doc("map columns to messages: QA, a question and an answer column; Chat, a column with a list of turns"),
    ] = None
    question_key: Annotated[str | None, Doc("QA: column of the question; Chat: column of the turns")] = None
    answer_key: Annotated[str | None, Doc("QA: column of the answer")] = None
    label_key: Annotated[str | None, Doc("trained column; must be the same as answer_key")] = None
    user_prompt: Annotated[
        str | None, Doc('template of the user message, with columns in braces: "{question}"')
    ] = None
    system_prompt: Annotated[str | None, Doc("system message for rows without one")] = None
    csv_delimiter: Annotated[
        str | None,
        Doc("separates the fields of CSV files: a character, or comma, semicolon, tab, pipe; null: detected"),
    ] = None
    encoding: Annotated[
        str | None, Doc("encoding of text files that are not UTF-8, such as cp1252; null: such rows are unusable")
    ] = None


@dataclass
class Dataset(ColumnArgs):
    """One of several datasets of a training run."""

    __pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

    path: Annotated[str, Len(1), Doc("file or folder of this dataset")] = "./data"
    pattern: Annotated[str | None, Doc("glob of its files; null: the split train, or every data file in path")] = (
        None
    )
    format: Annotated[DataFormat, Doc("format of its rows; auto detects it")] = "auto"
    weight: Annotated[
        float, Gt(0), Doc("how often an epoch contains each row: 2 twice, 0.5 a random half (drawn with seed)")
    ] = 1
    data_source: DataSource = field(default_factory=DataSource)


@dataclass
class DataArgs:
    dataset_path: Annotated[str, Len(1), Doc("folder with the training files, or one file")] = "./data"
    dataset_pattern: Annotated[str, Len(1), Doc("glob of the training files in dataset_path")] = "*.jsonl"
    data_format: Annotated[DataFormat, Doc("format of the training rows; auto detects it")] = "auto"
    data_source: DataSource = field(default_factory=DataSource)
    datasets: Annotated[
        list[Dataset], Doc("several datasets instead of dataset_path: [{path: a, format: auto, weight: 1}, ...]")
    ] = field(default_factory=list)
    trainDataConfig: Annotated[
        str | dict[str, Any] | None,
        Doc("datasets as {name: {data_path, strategy, ...}}, or the same as YAML text"),
    ] = None
    on_bad_row: Annotated[
        Literal["refuse", "skip"], Doc("rows that cannot be read: refuse to start, or skip and report them")
    ] = "refuse"
    max_length: Annotated[int, Ge(8), Doc("longest example in tokens; see on_overlength")] = 512
    cache_dir: Annotated[str | None, Doc("folder for downloaded and tokenized data; null: OUTPUT_DIR/cache")] = (
        None
    )


@dataclass
class RowArgs:
    """How valid rows become examples, and which of them are dropped."""

    train_on: Annotated[
        TrainOn,
        Doc("tokens with loss: completion, every assistant message; last_turn, the last one; all, every token"),
    ] = "completion"
    on_overlength: Annotated[
        OnOverlength,
        Doc("examples over max_length: drop, shorten the prompt, cut the end, or split into several examples"),
    ] = "reject"
    eval_split: Annotated[
        Annotated[int, Strict(), Ge(1)] | Annotated[float, Interval(gt=0, lt=1)] | None,
        Doc("hold rows out of the training data as the split test: a share such as 0.1, or a number of rows"),
    ] = None
    on_duplicate: Annotated[
        Literal["keep", "reject"],
        Doc("repeated rows (exact, normalized or near duplicates): keep or drop all but the first"),
    ] = "keep"
    on_contamination: Annotated[
        Literal["reject", "refuse", "keep"],
        Doc("training rows that also occur in the evaluation files: drop them, refuse to start, or keep them"),
    ] = "reject"
    dedup_threshold: Annotated[
        float, Interval(gt=0, le=1), Doc("Jaccard similarity from which two texts count as near duplicates")
    ] = 0.8
    check_mask: Annotated[
        Literal["sample", "all"],
        Doc("verify the loss mask of the first 5,000 rows and a sample of the rest, or of all rows"),
    ] = "sample"
    on_disputed_mask: Annotated[
        OnDisputedMask,
        Doc(
            "rows whose loss mask is not confirmed by its second derivation: drop them, or train on them and warn"
        ),
    ] = "reject"
    strict_data: Annotated[bool, Doc("refuse to start if the data report lists any problem")] = False
    num_proc: Annotated[
        int | None, Interval(ge=1, le=1024), Doc("processes that read and tokenize data; null: one per CPU core")
    ] = None


@dataclass
class TrainDataArgs(RowArgs, ColumnArgs, DataArgs):
    """The training data: where its files are, how their rows are read, and which rows are trained on."""


@dataclass
class DataPushArgs:
    dataset_path: Annotated[str, Len(1), Doc("folder to commit, or one file")] = "./data"
    dataset_pattern: Annotated[str, Len(1), Doc("glob of the files to commit; ** includes subfolders")] = "**/*"
    data_source: DataSource = field(default_factory=lambda: DataSource(type="lakefs", branch="main"))
    message: Annotated[str | None, Doc("commit message")] = None


@dataclass
class OptimArgs:
    epochs: Annotated[float, Gt(0), Doc("passes over the training data")] = 3
    max_steps: Annotated[
        int | None, Ge(1), Doc("number of optimizer steps, whatever epochs is; null: those of epochs")
    ] = None
    batch_size: Annotated[int, Ge(1), Doc("examples per device and forward pass")] = 8
    lr: Annotated[float, Gt(0), Doc("peak learning rate")] = 1e-3
    gradient_accumulation_steps: Annotated[int, Ge(1), Doc("batches per optimizer step")] = 1
    warmup_ratio: Annotated[float, Fraction, Doc("fraction of the steps in which the learning rate rises")] = 0.03
    weight_decay: Annotated[float, Ge(0), Doc("AdamW weight decay")] = 0.0
    adam_beta1: Annotated[float, Interval(ge=0, lt=1), Doc("AdamW decay rate of the first moment")] = 0.9
    adam_beta2: Annotated[float, Interval(ge=0, lt=1), Doc("AdamW decay rate of the second moment")] = 0.999
    adam_epsilon: Annotated[float, Gt(0), Doc("AdamW term that avoids division by zero")] = 1e-8
    optim: Annotated[
        Literal[
            "adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor",
            "lion_32bit", "lion_8bit", "paged_lion_8bit", "sgd",
        ],
        Doc("optimizer; paged ones move optimizer state to main memory when GPU memory is full"),
    ] = "adamw_torch_fused"  # fmt: skip
    lr_scheduler_type: Annotated[
        Literal[
            "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
            "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
        ],
        Doc("learning rate schedule after the warm-up"),
    ] = "cosine"  # fmt: skip
    lr_scheduler_kwargs: Annotated[dict[str, Any], Doc("arguments of the schedule, e.g. {num_cycles: 2}")] = field(
        default_factory=dict
    )
    max_grad_norm: Annotated[float, Gt(0), Doc("gradients are clipped to this L2 norm")] = 1.0
    gradient_checkpointing: Annotated[
        bool | Literal["auto"],
        Doc("recompute activations in the backward pass, which saves memory; auto: if the memory plan needs it"),
    ] = "auto"


@dataclass
class LossArgs:
    loss: Annotated[Literal["cross_entropy", "weighted", "focal"], Doc("loss function")] = "cross_entropy"
    class_weights: Annotated[
        dict[str, float], Doc("loss=weighted: {label or token: weight}; others have weight 1")
    ] = field(default_factory=dict)
    focal_gamma: Annotated[
        float, Ge(0), Doc("loss=focal: exponent that reduces the weight of well-predicted tokens")
    ] = 2.0
    label_smoothing_factor: Annotated[
        float, Interval(ge=0, lt=1), Doc("label smoothing: probability spread over all tokens")
    ] = 0.0
    neftune_noise_alpha: Annotated[
        float | None, Gt(0), Doc("alpha of NEFTune's embedding noise; null: no noise")
    ] = None


@dataclass
class SpeedArgs:
    padding_free: Annotated[
        bool, Doc("concatenate the examples of a batch instead of padding them, if the model supports it")
    ] = True
    packing: Annotated[
        bool, Doc("pack several examples into sequences of max_length; attention stays within each example")
    ] = False
    torch_compile: Annotated[bool, Doc("compile the model with torch.compile")] = False
    use_liger_kernel: Annotated[
        bool | Literal["auto"], Doc("Liger kernels; auto: on a GPU, if Liger is installed and supports the model")
    ] = "auto"
    tf32: Annotated[bool | Literal["auto"], Doc("TF32 for fp32 matrix products; auto: if the GPU supports it")] = (
        "auto"
    )
    deterministic: Annotated[
        bool, Doc("use deterministic algorithms only (bit-identical results); slower on a GPU")
    ] = False


@dataclass
class TokenArgs:
    new_tokens: Annotated[
        list[Annotated[str, Len(1)]],
        Doc("tokens to add, e.g. ['<|call|>']; their rows in embedding and output head are trained"),
    ] = field(default_factory=list)
    resize_embeddings: Annotated[
        bool, Doc("add and train rows for tokens of the tokenizer that the embedding has no rows for")
    ] = False


@dataclass
class MethodArgs(TokenArgs):
    method: Annotated[
        Literal["lora", "rslora", "dora", "qlora", "adalora", "ia3", "prefix", "p_tuning", "prompt", "full"],
        Doc("tuning method"),
    ] = "lora"
    lora_r: Annotated[int, Ge(1), Doc("LoRA rank")] = 16
    lora_alpha: Annotated[
        float, Gt(0), Doc("LoRA alpha: the update is scaled by alpha / r; usually 2 x lora_r")
    ] = 32
    lora_dropout: Annotated[float, Interval(ge=0, lt=1), Doc("LoRA dropout")] = 0.0
    lora_target_modules: Annotated[Names | None, Doc("modules that get an adapter; null: every linear layer")] = (
        None
    )
    peft: Annotated[dict[str, Any], Doc("other arguments of the method's PEFT config class")] = field(
        default_factory=dict
    )


@dataclass
class PlanArgs:
    memory_gb: Annotated[
        float | None, Gt(0), Doc("memory limit of the plan in GB (10^9 bytes); null: the device's free memory")
    ] = None
    force: Annotated[bool, Doc("train even if the memory plan does not fit")] = False


@dataclass
class ProbeArgs:
    probe: Annotated[bool, Doc("run 20 training steps and measure time and peak memory")] = False
    plan_device: Annotated[Literal["cpu", "cuda"] | None, Doc("device type to plan for; null: this machine's")] = (
        None
    )


@dataclass
class HardwareArgs:
    cuda_visible_devices: Annotated[
        str, Doc('GPUs to use, e.g. "0" or "0,1"; empty: CPU; default: CUDA_VISIBLE_DEVICES, else 0')
    ] = field(default_factory=lambda: os.environ.get("CUDA_VISIBLE_DEVICES", DEFAULT_GPUS))


@dataclass
class DistributedArgs:
    num_processes: Annotated[
        int | None, Ge(1), Doc("processes per machine; null: one per GPU of cuda_visible_devices, one on a CPU")
    ] = None
    num_nodes: Annotated[int, Ge(1), Doc("number of machines; under srun: those of the job step")] = 1
    node_rank: Annotated[int, Ge(0), Doc("rank of this machine, from 0; under srun: set by Slurm")] = 0
    master_addr: Annotated[str | None, Doc("host name or address of machine 0; under srun: its first machine")] = (
        None
    )
    master_port: Annotated[int | None, Interval(ge=1, le=65535), Doc("free port on machine 0; null: 29500")] = None
    distributed: Annotated[
        Literal["ddp", "fsdp2", "zero2", "zero3"],
        Doc("ddp splits the data; zero2 also shards optimizer and gradients; fsdp2 and zero3 also the weights"),
    ] = "ddp"
    offload: Annotated[bool, Doc("keep what fsdp2, zero2 or zero3 shard in main memory")] = False


@dataclass
class OutputArgs:
    output_dir: Annotated[str, Len(1), Doc("run directories are OUTPUT_DIR/runs/<timestamp>")] = "outputs"
    artifacts_dir: Annotated[str, Len(1), Doc("folder for published models and base model metrics")] = "artifacts"


@dataclass
class SeedArgs:
    seed: Annotated[int, Interval(ge=0, lt=2**32), Doc("seed of all random number generators")] = 42


@dataclass
class LoopArgs:
    run_name: Annotated[
        str | None, Doc("name of the run in tables and trackers; null: made from method, lr and data")
    ] = None
    logging_steps: Annotated[int, Ge(1), Doc("log the loss every N steps")] = 5
    dev_split: Annotated[
        str, Len(1), Doc("split of the evaluation loss: a file of eval_path, or test with eval_split")
    ] = "dev"
    eval_steps: Annotated[
        int | None, Ge(1), Doc("evaluate the loss on dev_split every N steps; null: every eval_epochs")
    ] = None
    eval_epochs: Annotated[float, Gt(0), Doc("evaluate the loss on dev_split every N epochs")] = 1
    save_steps: Annotated[int | None, Ge(1), Doc("save a checkpoint every N steps; null: every epoch")] = None
    save_total_limit: Annotated[int, Ge(1), Doc("checkpoints to keep, in addition to the best one")] = 2
    early_stopping_patience: Annotated[
        int | None, Ge(1), Doc("stop after N evaluations in a row without improvement; null: never")
    ] = None
    early_stopping_threshold: Annotated[
        float, Ge(0), Doc("how much lower the loss must be to count as an improvement")
    ] = 0.0
    load_best_model_at_end: Annotated[bool, Doc("end with the weights of the lowest evaluation loss")] = False
    report_to: Annotated[
        list[Literal["tensorboard", "mlflow", "wandb"]], Doc("trackers; TensorBoard is always on")
    ] = field(default_factory=list)
    resume: Annotated[
        str,
        Len(1),
        Doc(
            "auto: resume a stopped run with the same settings, if any; never; latest; or a run's id or directory"
        ),
    ] = "auto"
    checkpoint_mirror: Annotated[str | None, Doc("s3://bucket/prefix to which checkpoints are copied")] = None
    checkpoint_mirror_endpoint: Annotated[
        str | None, Doc("S3-compatible server of checkpoint_mirror; null: the one in the environment")
    ] = None
    trainer: Annotated[dict[str, Any], Doc("other arguments of transformers.TrainingArguments")] = field(
        default_factory=dict
    )


@dataclass
class EvalDataArgs:
    eval_path: Annotated[
        Annotated[str, Len(1)] | None,
        Doc("folder with a file for each split, test.jsonl ...; null: eval/ in or beside dataset_path; or none"),
    ] = None


@dataclass
class JudgeArgs:
    """What a model is evaluated on and by: settings of an evaluation that a training run may record."""

    reference_turn: Annotated[
        int | None,
        Doc("answer of an evaluation row that is its reference: 1 the first, -1 the last; null: the last"),
    ] = None
    splits: Annotated[
        Names | None, Doc("splits to evaluate: data files of eval_path, by name; null: all of them")
    ] = None
    metrics: Annotated[
        Names | None, Doc("metric names, evaluate:NAME or file:PATH.py; null: the metrics of the task")
    ] = None


@dataclass
class EvalArgs(JudgeArgs):
    engine: Annotated[Literal["transformers", "vllm"], Doc("inference engine")] = "transformers"
    eval_batch_size: Annotated[
        Annotated[int, Ge(1)] | Literal["auto"],
        Doc("prompts per batch; auto: as many as fit into memory"),
    ] = "auto"
    max_new_tokens: Annotated[int, Ge(1), Doc("longest generation in tokens")] = 64
    stop: Annotated[list[str], Doc("stop strings, in addition to the end-of-turn token")] = field(
        default_factory=list
    )
    max_examples: Annotated[int | None, Ge(1), Doc("evaluate only the first N rows of each split")] = None
    overwrite_answers: Annotated[
        bool, Doc("generate every answer again instead of reusing those of an interrupted evaluation")
    ] = False
    generation: Annotated[
        dict[str, Any], Doc("other arguments of transformers.GenerationConfig; empty: greedy decoding")
    ] = field(default_factory=dict)


@dataclass
class TunedEvalArgs:
    merge_adapter: Annotated[
        bool | Literal["auto"],
        Doc("merge the adapter in memory, which is faster; auto: if the merged model is close enough"),
    ] = "auto"
    baseline: Annotated[
        Literal["auto", "cached", "never"],
        Doc("base model results: cached ones only, none, or auto: cached, else evaluate the base model too"),
    ] = "auto"
    allow_base_mismatch: Annotated[
        bool, Doc("evaluate an adapter on another revision of its base model than it was trained on")
    ] = False


@dataclass
class TunedArgs:
    model_path: Annotated[str | None, Doc("run or model folder; null: the newest finished run")] = None


@dataclass
class ReportArgs:
    model_path: Annotated[str | None, Doc("run in any state; null: the newest")] = None


@dataclass
class TunedTaskArgs:
    task: Annotated[Task | None, Doc("task of the model; null: the one recorded in its folder")] = None


@dataclass
class TokenizationArgs:
    allow_tokenizer_mismatch: Annotated[
        bool, Doc("evaluate with another tokenizer or chat template than the model was trained with")
    ] = False


@dataclass
class Guard:
    """A metric that must not get worse while the deciding metric of the gate improves."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    metric: Annotated[str | None, Doc("guarded metric; null: gate.metric")] = None
    split: Annotated[str, Len(1), Doc("split of the guarded metric")] = "adversarial"
    max_drop: Annotated[float, Ge(0), Doc("largest accepted drop below the base model, in the metric's units")] = (
        0.0
    )


@dataclass
class GateArgs:
    """The promotion gate: when a tuned model counts as better than its base."""

    metric: Annotated[str | None, Doc("deciding metric; null: rougeL, or accuracy for classification")] = None
    split: Annotated[
        Annotated[str, Len(1)] | None, Doc("split of the deciding metric; null: test, or the only split")
    ] = None
    min_delta: Annotated[float, Doc("required gain over the base model, in the metric's units")] = 0.0
    confidence: Annotated[
        float, Interval(ge=0.5, lt=1), Doc("confidence level of the interval that must be above min_delta")
    ] = 0.95
    guards: Annotated[
        list[Guard] | None,
        Doc("metrics that must not get worse, [{metric, split, max_drop}, ...]; null: gate.metric on adversarial"),
    ] = None
    min_examples: Annotated[int, Ge(2), Doc("with fewer examples the result is inconclusive")] = 20
    resamples: Annotated[int, Ge(100), Doc("resamples of the paired bootstrap")] = 10_000
    verify_examples: Annotated[int, Ge(0), Doc("answers that the saved model must reproduce; 0: no check")] = 8


DEFAULT_GUARD = Guard(split="adversarial", max_drop=0.02)  # where that split was evaluated


@dataclass
class NestedGateArgs:
    gate: GateArgs = field(default_factory=GateArgs)


@dataclass
class CompareArgs:
    run_a: Annotated[str, Len(1), Doc("evaluated run: id, directory or latest")] = "latest"
    run_b: Annotated[
        str, Len(1), Doc("run to compare with, or baseline: the cached results of the base model")
    ] = "baseline"


TargetName = Literal["local", "hub"]


@dataclass
class PublishArgs:
    target: Annotated[
        TargetName,
        Doc("where to publish: local, ARTIFACTS_DIR/models; hub, the Hugging Face Hub"),
    ] = "local"
    publish_name: Annotated[str | None, Doc("name of the published model; null: <base>-<method>")] = None
    repo_id: Annotated[str | None, Doc("Hub repository, user/name; default: HF_REPO_ID")] = field(
        default_factory=lambda: os.environ.get("HF_REPO_ID")
    )
    private: Annotated[bool, Doc("make the Hub repository private")] = True
    force: Annotated[bool, Doc("publish even if the gate rejects the model")] = False
    export: Annotated[
        Literal["adapter", "merged", "onnx", "gguf"] | None,
        Doc("form of the published model; null: as it was trained"),
    ] = None
    export_max_kl: Annotated[
        float, Ge(0), Doc("merged: largest mean KL divergence from the adapter model, in nats per token")
    ] = 0.01
    export_max_drop: Annotated[
        float, Ge(0), Doc("merged: largest accepted drop below the adapter model in the gate's metric")
    ] = 0.01
    license: Annotated[
        str | None,
        Doc("license of the published model, a Hub identifier such as apache-2.0; null: the base model's"),
    ] = None


@dataclass
class ValidateArgs:
    training_info: Annotated[str | None, Doc("training_info.json to check; null: the record of the run")] = None
    profile_path: Annotated[str | None, Doc("aim_profile.json to check; null: the run's")] = None
    max_loss: Annotated[float, Gt(0), Doc("largest accepted final training loss, in nats per token")] = 10.0
    num_prompts: Annotated[int, Ge(1), Doc("test prompts that the saved model must answer")] = 4


@dataclass
class SearchArgs:
    """Settings of a sweep. They are not part of a run's config_used.yaml."""

    space: Annotated[
        dict[str, Any], Doc("search space: {lr: 'tag(log, interval(1e-4, 1e-2))', lora_r: [8, 16]}")
    ] = field(default_factory=dict)
    trials: Annotated[int, Ge(1), Doc("number of trials")] = 20
    metric: Annotated[str, Len(1), Doc("value in a run's metrics.json by which trials are ranked")] = "eval_loss"
    direction: Annotated[Literal["minimize", "maximize"], Doc("whether a lower or a higher value is better")] = (
        "minimize"
    )
    resume: Annotated[bool, Doc("continue the unfinished sweep of the same command, if any")] = True


@dataclass
class SlurmArgs:
    """Resources that launch=slurm requests. They are not part of a run's config_used.yaml."""

    partition: Annotated[str | None, Doc("partition; null: the cluster's default")] = None
    account: Annotated[str | None, Doc("account to charge")] = None
    qos: Annotated[str | None, Doc("quality of service")] = None
    constraint: Annotated[str | None, Doc("required node features, e.g. 'a100|h100'")] = None
    timeout_min: Annotated[int, Ge(1), Doc("time limit of a job in minutes")] = 1440
    nodes: Annotated[int, Ge(1), Doc("nodes per job")] = 1
    gpus_per_node: Annotated[int | None, Ge(0), Doc("GPUs per node; a training run uses all of them")] = None
    cpus_per_task: Annotated[int | None, Ge(1), Doc("CPU cores per node")] = None
    mem_gb: Annotated[float | None, Gt(0), Doc("main memory per node in GB")] = None
    max_parallel: Annotated[int, Ge(1), Doc("largest number of sweep jobs that run at the same time")] = 256
    max_requeues: Annotated[
        int, Ge(0), Doc("how often a job that reaches its time limit is requeued to resume")
    ] = 3
    signal_delay_s: Annotated[
        int, Ge(1), Doc("seconds before the time limit at which a job receives the signal to save a checkpoint")
    ] = 120
    sbatch: Annotated[dict[str, Any], Doc("other options of sbatch, e.g. {exclude: node7}")] = field(
        default_factory=dict
    )


@dataclass
class SweepArgs:
    search: SearchArgs = field(default_factory=SearchArgs)


_STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

# The field order of a dataclass follows its bases in reverse.


@dataclass
class TrainConfig(
    NestedGateArgs, OutputArgs, SeedArgs, JudgeArgs, EvalDataArgs, LoopArgs, DistributedArgs, PlanArgs,
    HardwareArgs, SpeedArgs, MethodArgs, PrecisionArgs, LossArgs, OptimArgs, TrainDataArgs, ChatArgs, TrustArgs,
    InitArgs, ModelArgs,
):  # fmt: skip
    __pydantic_config__ = _STRICT


@dataclass
class PlanConfig(ProbeArgs, TrainConfig):
    """The settings of the training run that is planned, and those of the plan."""

    __pydantic_config__ = _STRICT


@dataclass
class DataPushConfig(DataPushArgs):
    __pydantic_config__ = _STRICT


@dataclass
class EvalConfig(
    NestedGateArgs,
    OutputArgs,
    SeedArgs,
    HardwareArgs,
    PrecisionArgs,
    EvalArgs,
    EvalDataArgs,
    ColumnArgs,
    TunedEvalArgs,
    ChatArgs,
    TrustArgs,
    TokenizationArgs,
    TunedTaskArgs,
    TunedArgs,
):
    __pydantic_config__ = _STRICT


@dataclass
class BaselineConfig(
    NestedGateArgs, OutputArgs, SeedArgs, HardwareArgs, PrecisionArgs, EvalArgs, EvalDataArgs, ColumnArgs,
    TokenArgs, ChatArgs, TrustArgs, ModelArgs,
):  # fmt: skip
    __pydantic_config__ = _STRICT

    model_name: Annotated[
        Annotated[str, Len(1)] | None,
        Doc("Hub id or local folder of the base model; null: the base of the newest run"),
    ] = None  # type: ignore[assignment]


@dataclass
class PublishConfig(NestedGateArgs, OutputArgs, HardwareArgs, PublishArgs, TrustArgs, TunedArgs):
    __pydantic_config__ = _STRICT


@dataclass
class PublishHfConfig(PublishConfig):
    """PublishConfig with target=hub as its default."""

    __pydantic_config__ = _STRICT

    target: Annotated[TargetName, Doc("publish-hf is publish with target=hub")] = "hub"


@dataclass
class CompareConfig(NestedGateArgs, OutputArgs, CompareArgs):
    __pydantic_config__ = _STRICT


@dataclass
class ReportConfig(OutputArgs, ReportArgs):
    __pydantic_config__ = _STRICT


@dataclass
class ValidateConfig(OutputArgs, HardwareArgs, ValidateArgs, TrustArgs, TunedArgs):
    __pydantic_config__ = _STRICT


@dataclass
class SweepConfig(SweepArgs):
    __pydantic_config__ = _STRICT


@dataclass
class SlurmConfig(SlurmArgs):
    __pydantic_config__ = _STRICT


SLURM_KEYS = tuple(item.name for item in fields(SlurmArgs))
