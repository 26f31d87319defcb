"""The schema: small dataclasses mixed into one flat configuration a stage.

Each mixin is what one room of the house needs; a function takes the mixin, not the whole.
The keys are those of the documented YAML files; every other key has its default and its one-line
meaning here, and `--help` is made from them. Two mixins must never share a field name
(Python would merge them in silence): tests/test_config.py refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Len
from pydantic import ConfigDict
from typing_extensions import Doc

DEMO_MODEL = "models/SmolLM2-135M-Instruct"

Bf16 = bool | Literal["auto"]
Task = Literal["causal_lm", "seq2seq", "classification"]
Share = Interval(ge=0, le=1)
Names = Annotated[list[str], Len(1)]


@dataclass
class ModelArgs:
    model_name: Annotated[str, Len(1), Doc("Hub id or local folder of the base model")] = DEMO_MODEL
    model_revision: Annotated[str | None, Doc("branch, tag or commit on the Hub; null is main")] = None
    task: Annotated[
        Task, Doc("goes on with a text; answers what an encoder has read; or chooses one of the labels")
    ] = "causal_lm"


@dataclass
class TrustArgs:
    trust_remote_code: Annotated[bool, Doc("run Python code that the model repository ships")] = False


@dataclass
class PrecisionArgs:
    bf16: Annotated[
        Bf16, Doc("true: bfloat16; false: fp16 on a GPU, fp32 on a CPU; auto: bfloat16 where native")
    ] = "auto"


@dataclass
class DataSource:
    """Where files come from. SOURCE_KEYS says which keys belong to which type."""

    type: Annotated[Literal["local", "lakefs", "hub", "url", "s3"], Doc("where the training files come from")] = (
        "local"
    )
    endpoint: Annotated[
        str | None, Doc("server of lakeFS, the Hub or S3; null is the environment's, or the public one")
    ] = None
    repo: Annotated[str | None, Doc("lakeFS repository, or dataset id on the Hub")] = None
    branch: Annotated[str | None, Doc("lakeFS branch, resolved to a commit; null is main")] = None
    tag: Annotated[str | None, Doc("lakeFS tag, instead of a branch")] = None
    commit: Annotated[str | None, Doc("lakeFS commit, instead of a branch")] = None
    revision: Annotated[str | None, Doc("branch, tag or commit on the Hub; null is main")] = None
    bucket: Annotated[str | None, Doc("S3 bucket")] = None
    path: Annotated[str, Doc("folder inside the repository or the bucket")] = ""
    url: Annotated[str | None, Doc("http(s) address of one file")] = None
    sha256: Annotated[str | None, Doc("what the downloaded file must hash to")] = None
    max_gb: Annotated[float, Gt(0), Doc("most that a source may send, in GB")] = 100
    allow_private: Annotated[bool, Doc("let a url lead to a private address")] = False


SOURCE_KEYS: dict[str, set[str]] = {
    "local": set(),
    "lakefs": {"endpoint", "repo", "branch", "tag", "commit", "path", "max_gb"},
    "hub": {"endpoint", "repo", "revision", "path", "max_gb"},
    "url": {"url", "sha256", "max_gb", "allow_private"},
    "s3": {"endpoint", "bucket", "path", "max_gb"},
}

DataFormat = Literal[
    "auto", "messages", "prompt_completion", "instruction", "conversations", "classification", "text"
]
Strategy = Literal["QA", "Chat"]
TrainOn = Literal["completion", "last_turn", "all"]
OnOverlength = Literal["reject", "truncate_prompt", "truncate", "split"]


@dataclass
class ColumnArgs:
    strategy: Annotated[
        Strategy | None,
        Doc("take rows by column: QA, a question and an answer; Chat, a list of turns"),
    ] = None
    question_key: Annotated[str | None, Doc("column of the question, or of the turns of a Chat")] = None
    answer_key: Annotated[str | None, Doc("column of the answer")] = None
    label_key: Annotated[str | None, Doc("column that is learnt; the same as answer_key")] = None
    user_prompt: Annotated[str | None, Doc('what the user says, with columns in braces: "{question}"')] = None
    system_prompt: Annotated[str | None, Doc("system turn of the rows that have none")] = None


@dataclass
class Dataset(ColumnArgs):
    """One of several data sets that are trained on together."""

    __pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

    path: Annotated[str, Len(1), Doc("file or folder of this data set")] = "./data"
    pattern: Annotated[str | None, Doc("glob of its files; null is every data file of path")] = None
    format: Annotated[DataFormat, Doc("shape of its rows")] = "auto"
    weight: Annotated[float, Gt(0), Doc("how often an epoch sees each row: 2 is twice, 0.5 a seeded half")] = 1
    data_source: DataSource = field(default_factory=DataSource)


@dataclass
class DataArgs:
    dataset_path: Annotated[str, Len(1), Doc("folder that holds the training files, or one file")] = "./data"
    dataset_pattern: Annotated[str, Len(1), Doc("glob of the training files inside it")] = "*.jsonl"
    data_format: Annotated[DataFormat, Doc("shape of a training row; auto looks at the rows")] = "messages"
    data_source: DataSource = field(default_factory=DataSource)
    datasets: Annotated[
        list[Dataset], Doc("several data sets instead: [{path: a, format: auto, weight: 1}, ...]")
    ] = field(default_factory=list)
    trainDataConfig: Annotated[
        str | dict[str, Any] | None, Doc("data sets as {name: {data_path, strategy, ...}}, or that as YAML text")
    ] = None
    on_bad_row: Annotated[
        Literal["refuse", "skip"], Doc("a row that cannot be used: refuse to start, or skip and report")
    ] = "refuse"
    max_length: Annotated[int, Ge(8), Doc("longest row in tokens")] = 512
    cache_dir: Annotated[str | None, Doc("fetched and tokenised data; null is OUTPUT_DIR/cache")] = None


@dataclass
class RowArgs:
    """What is done with rows that can be read."""

    train_on: Annotated[TrainOn, Doc("loss on every answer, the last answer, or every token")] = "completion"
    on_overlength: Annotated[
        OnOverlength,
        Doc("a row over max_length: leave it out, cut its prompt, cut its end, or train on its pieces"),
    ] = "reject"
    on_duplicate: Annotated[
        Literal["keep", "reject"], Doc("a row that occurred before, exactly, normalised or nearly")
    ] = "keep"
    on_contamination: Annotated[
        Literal["reject", "refuse", "keep"], Doc("a row that occurs in the evaluation files of eval_path")
    ] = "reject"
    dedup_threshold: Annotated[
        float, Interval(gt=0, le=1), Doc("texts are near duplicates from this Jaccard similarity on")
    ] = 0.8
    check_mask: Annotated[
        Literal["sample", "all"], Doc("prove the mask on 10,000 rows and a sample of the rest, or on all")
    ] = "sample"
    strict_data: Annotated[bool, Doc("refuse to start at any finding")] = False
    num_proc: Annotated[int | None, Ge(1), Doc("processes that read data; null is one a core")] = None


@dataclass
class DataPushArgs:
    dataset_path: Annotated[str, Len(1), Doc("folder to commit, or one file")] = "./data"
    dataset_pattern: Annotated[str, Len(1), Doc("glob of the files to commit; ** goes into folders")] = "**/*"
    data_source: DataSource = field(default_factory=lambda: DataSource(type="lakefs"))
    message: Annotated[str | None, Doc("what the commit says")] = None


@dataclass
class OptimArgs:
    epochs: Annotated[float, Gt(0), Doc("passes over the training rows")] = 3
    max_steps: Annotated[int | None, Ge(1), Doc("stop after this many optimizer steps")] = None
    batch_size: Annotated[int, Ge(1), Doc("rows a device and step")] = 8
    lr: Annotated[float, Gt(0), Doc("peak learning rate")] = 1e-3
    gradient_accumulation_steps: Annotated[int, Ge(1), Doc("batches added up before a step")] = 1
    warmup_ratio: Annotated[float, Share, Doc("share of the steps with rising learning rate")] = 0.03
    weight_decay: Annotated[float, Ge(0), Doc("AdamW weight decay")] = 0.0
    adam_beta1: Annotated[float, Interval(ge=0, lt=1), Doc("AdamW decay of the gradient's mean")] = 0.9
    adam_beta2: Annotated[float, Interval(ge=0, lt=1), Doc("AdamW decay of the gradient's square")] = 0.999
    adam_epsilon: Annotated[float, Gt(0), Doc("AdamW term against division by zero")] = 1e-8
    optim: Annotated[
        Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd"],
        Doc("optimizer; the paged ones move to main memory what a GPU has no room for"),
    ] = "adamw_torch_fused"
    lr_scheduler_type: Annotated[
        Literal[
            "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
            "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
        ],
        Doc("learning rate after the warm-up"),
    ] = "cosine"  # fmt: skip
    lr_scheduler_kwargs: Annotated[dict[str, Any], Doc("what the scheduler takes, e.g. {num_cycles: 2}")] = field(
        default_factory=dict
    )
    max_grad_norm: Annotated[float, Gt(0), Doc("gradients are clipped to this L2 norm")] = 1.0
    gradient_checkpointing: Annotated[
        bool | Literal["auto"],
        Doc("recompute activations: less memory, more time; auto: where the memory plan needs it"),
    ] = "auto"


@dataclass
class LossArgs:
    loss: Annotated[Literal["cross_entropy", "weighted", "focal"], Doc("entry of the LOSSES table")] = (
        "cross_entropy"
    )
    class_weights: Annotated[
        dict[str, float], Doc("loss=weighted: {label or token: weight}, 1 for those not named")
    ] = field(default_factory=dict)
    focal_gamma: Annotated[float, Ge(0), Doc("loss=focal: how much less a token counts that is known well")] = 2.0
    label_smoothing_factor: Annotated[
        float, Interval(ge=0, lt=1), Doc("share of the target spread over all tokens")
    ] = 0.0
    neftune_noise_alpha: Annotated[float | None, Gt(0), Doc("NEFTune noise on the embeddings")] = None


@dataclass
class SpeedArgs:
    padding_free: Annotated[
        bool, Doc("lay the rows of a batch end to end instead of padding them, where the model can")
    ] = True
    packing: Annotated[bool, Doc("fill rows up to max_length with several examples, each seeing itself only")] = (
        False
    )
    torch_compile: Annotated[bool, Doc("compile the model with torch.compile")] = False
    use_liger_kernel: Annotated[
        bool | Literal["auto"], Doc("Liger kernels; auto: on a GPU, where installed and the model is known")
    ] = "auto"
    tf32: Annotated[bool | Literal["auto"], Doc("TF32 for fp32 matrix products; auto: where the GPU has it")] = (
        "auto"
    )
    deterministic: Annotated[bool, Doc("only algorithms that give the same bits each time; slower on a GPU")] = (
        False
    )


@dataclass
class MethodArgs:
    method: Annotated[
        Literal["lora", "rslora", "dora", "qlora", "adalora", "ia3", "prefix", "p_tuning", "prompt", "full"],
        Doc("how the weights are tuned"),
    ] = "lora"
    lora_r: Annotated[int, Ge(1), Doc("rank of the update matrices")] = 16
    lora_alpha: Annotated[float, Gt(0), Doc("scale of the update; usually 2 x lora_r")] = 32
    lora_dropout: Annotated[float, Interval(ge=0, lt=1), Doc("dropout before the update")] = 0.05
    lora_target_modules: Annotated[Names | None, Doc("modules that get an update; null is every linear layer")] = (
        None
    )
    peft: Annotated[dict[str, Any], Doc("further arguments of the method's peft config")] = field(
        default_factory=dict
    )


@dataclass
class PlanArgs:
    memory_gb: Annotated[
        float | None, Gt(0), Doc("memory to plan with, in GB of 10^9 bytes; null is what the device has free")
    ] = None
    force: Annotated[bool, Doc("train even where the plan says that it cannot fit")] = False


@dataclass
class ProbeArgs:
    probe: Annotated[bool, Doc("take 20 steps of the training, for its time and its true peak")] = False
    plan_device: Annotated[
        Literal["cpu", "cuda"] | None, Doc("kind of device to plan for; null is the one that is here")
    ] = None


@dataclass
class HardwareArgs:
    cuda_visible_devices: Annotated[str, Doc('GPUs to use, e.g. "0" or "0,1"')] = "0"


@dataclass
class LaunchArgs:
    num_processes: Annotated[
        int | None, Ge(1), Doc("processes a machine; null is one a GPU of cuda_visible_devices, one on a CPU")
    ] = None
    num_nodes: Annotated[int, Ge(1), Doc("machines that train together; under srun those of its step")] = 1
    node_rank: Annotated[int, Ge(0), Doc("which of them this one is, from 0; under srun by itself")] = 0
    master_addr: Annotated[str | None, Doc("host name or address of machine 0; under srun by itself")] = None
    master_port: Annotated[int | None, Interval(ge=1, le=65535), Doc("free port there; null is 29500")] = None
    distributed: Annotated[
        Literal["ddp", "fsdp2", "zero2", "zero3"],
        Doc("what processes share out: ddp rows; zero2 optimizer and gradients too; fsdp2, zero3 weights too"),
    ] = "ddp"
    offload: Annotated[bool, Doc("keep in main memory what fsdp2, zero2 or zero3 share out")] = False


@dataclass
class OutputArgs:
    output_dir: Annotated[str, Len(1), Doc("runs are written to OUTPUT_DIR/runs/<timestamp>")] = "outputs"
    artifacts_dir: Annotated[str, Len(1), Doc("published models and baseline metrics")] = "artifacts"


@dataclass
class SeedArgs:
    seed: Annotated[int, Ge(0), Doc("seed of every random number generator")] = 42


@dataclass
class LoopArgs:
    logging_steps: Annotated[int, Ge(1), Doc("write the loss every N steps")] = 5
    eval_steps: Annotated[
        int | None, Ge(1), Doc("loss on the dev split every N steps; null is every eval_epochs")
    ] = None
    eval_epochs: Annotated[float, Gt(0), Doc("loss on the dev split every N epochs")] = 1
    save_steps: Annotated[int | None, Ge(1), Doc("a checkpoint every N steps; null is every epoch")] = None
    save_total_limit: Annotated[int, Ge(1), Doc("checkpoints kept, the best one besides")] = 2
    early_stopping_patience: Annotated[
        int | None, Ge(1), Doc("stop after N evaluations in a row that are no better; null does not")
    ] = None
    early_stopping_threshold: Annotated[float, Ge(0), Doc("how much lower the loss must be to be better")] = 0.0
    load_best_model_at_end: Annotated[bool, Doc("keep the weights of the lowest evaluation loss")] = False
    report_to: Annotated[
        list[Literal["tensorboard", "mlflow", "wandb"]], Doc("where curves go besides TensorBoard")
    ] = field(default_factory=list)
    resume: Annotated[
        str,
        Len(1),
        Doc("never; auto: go on with a stopped run of these very settings; latest; or a run's id or directory"),
    ] = "auto"
    checkpoint_mirror: Annotated[str | None, Doc("s3://bucket/prefix that checkpoints are copied to")] = None
    checkpoint_mirror_endpoint: Annotated[
        str | None, Doc("S3-compatible server of checkpoint_mirror; null is the environment's")
    ] = None
    trainer: Annotated[dict[str, Any], Doc("further arguments of transformers.TrainingArguments")] = field(
        default_factory=dict
    )


@dataclass
class EvalDataArgs:
    eval_path: Annotated[str, Len(1), Doc("folder with test.jsonl, dev.jsonl, adversarial.jsonl")] = "./data/eval"


@dataclass
class EvalArgs:
    splits: Annotated[Names, Doc("files of eval_path to answer, without .jsonl")] = field(
        default_factory=lambda: ["test", "dev", "adversarial"]
    )
    metrics: Annotated[
        Names | None, Doc("entries of METRICS, evaluate:NAME or file:PATH.py; null is those of the task")
    ] = None
    engine: Annotated[Literal["transformers", "vllm"], Doc("what generates the answers")] = "transformers"
    eval_batch_size: Annotated[
        Annotated[int, Ge(1)] | Literal["auto"],
        Doc("prompts answered at once; auto: what the memory has room for"),
    ] = "auto"
    max_new_tokens: Annotated[int, Ge(1), Doc("longest answer in tokens")] = 64
    stop: Annotated[list[str], Doc("texts that end an answer, besides the end of the turn")] = field(
        default_factory=list
    )
    max_examples: Annotated[int | None, Ge(1), Doc("only the first N rows of each split")] = None
    overwrite_answers: Annotated[
        bool, Doc("answer every prompt anew, also those that a stopped evaluation answered")
    ] = False
    generation: Annotated[
        dict[str, Any], Doc("further arguments of transformers.GenerationConfig; greedy without")
    ] = field(default_factory=dict)


@dataclass
class TunedEvalArgs:
    merge_adapter: Annotated[
        bool | Literal["auto"], Doc("merge the adapter in memory, which is faster; auto: where it is exact enough")
    ] = "auto"
    baseline: Annotated[
        Literal["auto", "cached", "never"],
        Doc("the base's answers: kept ones; auto: where there are none, ask the base in the same load"),
    ] = "auto"
    allow_base_mismatch: Annotated[
        bool, Doc("evaluate an adapter over another revision of its base than it was made on")
    ] = False


@dataclass
class TunedArgs:
    model_path: Annotated[str | None, Doc("run or model folder; null is the newest finished run")] = None


@dataclass
class ReportArgs:
    model_path: Annotated[str | None, Doc("run, finished and evaluated or not; null is the newest")] = None


@dataclass
class TunedTaskArgs:
    task: Annotated[Task | None, Doc("what the model was tuned for; null is what its folder says")] = None


@dataclass
class TokenizationArgs:
    allow_tokenizer_mismatch: Annotated[
        bool, Doc("evaluate with another tokenizer or chat template than the model was tuned with")
    ] = False


@dataclass
class Guard:
    """What must not get worse while the gate's metric gets better."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    metric: Annotated[str | None, Doc("metric that is guarded; null is the gate's")] = None
    split: Annotated[str, Len(1), Doc("split on which it is guarded")] = "adversarial"
    max_drop: Annotated[float, Ge(0), Doc("how much worse than the base it may be, in the metric's units")] = 0.0


@dataclass
class GateArgs:
    metric: Annotated[str | None, Doc("metric that decides; null is rougeL, or accuracy of a classification")] = (
        None
    )
    split: Annotated[str, Len(1), Doc("split that decides")] = "test"
    min_delta: Annotated[float, Doc("how much better than the base, in the metric's units")] = 0.0
    confidence: Annotated[float, Interval(ge=0.5, lt=1), Doc("of the interval that must lie above min_delta")] = (
        0.95
    )
    guards: Annotated[list[Guard], Doc("what must not get worse: [{metric, split, max_drop}, ...]")] = field(
        default_factory=lambda: [Guard(max_drop=0.02)]
    )
    min_examples: Annotated[int, Ge(2), Doc("fewer examples than this tell nothing")] = 20
    resamples: Annotated[int, Ge(100), Doc("draws of the paired bootstrap")] = 10_000
    verify_examples: Annotated[
        int, Ge(0), Doc("answers that the saved model must give again; 0 asks for none")
    ] = 8


@dataclass
class GateHolder:
    gate: GateArgs = field(default_factory=GateArgs)


@dataclass
class CompareArgs:
    run_a: Annotated[str, Len(1), Doc("evaluated run: its id, its directory, or latest")] = "latest"
    run_b: Annotated[
        str, Len(1), Doc("what it is compared with: another run, or baseline for the kept answers of its base")
    ] = "baseline"


TargetName = Literal["local", "hub"]


@dataclass
class PublishArgs:
    target: Annotated[
        TargetName,
        Doc("where to publish: local, a folder under artifacts_dir; hub, the Hugging Face Hub"),
    ] = "local"
    publish_name: Annotated[str | None, Doc("name under artifacts/models; null is <base>-<method>")] = None
    repo_id: Annotated[str | None, Doc("Hub repository, user/name")] = None
    private: Annotated[bool, Doc("keep the Hub repository private")] = True
    force: Annotated[bool, Doc("publish even where the gate says no")] = False
    export: Annotated[
        Literal["adapter", "merged", "onnx", "gguf"] | None, Doc("form of the model; null is as it was trained")
    ] = None
    export_max_kl: Annotated[
        float, Ge(0), Doc("merged: mean KL divergence from the adapter's answers, in nats a token, at most")
    ] = 0.01
    export_max_drop: Annotated[
        float, Ge(0), Doc("merged: how much worse than the adapter by the gate's metric, at most")
    ] = 0.01
    license: Annotated[
        str | None, Doc("of the published model, as the Hub writes it: apache-2.0; null is the base model's")
    ] = None


@dataclass
class ValidateArgs:
    training_info: Annotated[str | None, Doc("training_info.json to read; null is the run's own record")] = None
    profile_path: Annotated[str | None, Doc("aim_profile.json to check; null is the run's")] = None
    max_loss: Annotated[float, Gt(0), Doc("where a training loss should end, at most, in nats a token")] = 10.0
    num_prompts: Annotated[int, Ge(1), Doc("prompts that the saved model is asked")] = 4


@dataclass
class SearchArgs:
    """A sweep's own settings: they are of no run, and stand in no run's config_used.yaml."""

    space: Annotated[
        dict[str, Any], Doc("settings to draw: {lr: 'tag(log, interval(1e-4, 1e-2))', lora_r: [8, 16]}")
    ] = field(default_factory=dict)
    trials: Annotated[int, Ge(1), Doc("trials of a search")] = 20
    metric: Annotated[str, Len(1), Doc("figure of a run's metrics.json by which trials are ranked")] = "eval_loss"
    direction: Annotated[Literal["minimize", "maximize"], Doc("which of two figures is the better one")] = (
        "minimize"
    )
    resume: Annotated[bool, Doc("go on with the unfinished sweep of the same command, if there is one")] = True


@dataclass
class SlurmArgs:
    """What launch=slurm asks the scheduler for: it is of no run, and stands in no run's config_used.yaml."""

    partition: Annotated[str | None, Doc("partition of the jobs; null is the cluster's own")] = None
    account: Annotated[str | None, Doc("account that is charged")] = None
    qos: Annotated[str | None, Doc("quality of service")] = None
    constraint: Annotated[str | None, Doc("features that a machine must have, e.g. 'a100|h100'")] = None
    timeout_min: Annotated[int, Ge(1), Doc("time limit of a job in minutes; a day without")] = 1440
    nodes: Annotated[int, Ge(1), Doc("machines a job, which train together")] = 1
    gpus_per_node: Annotated[int | None, Ge(0), Doc("GPUs on each of them; a training uses all of them")] = None
    cpus_per_task: Annotated[int | None, Ge(1), Doc("cores on each of them")] = None
    mem_gb: Annotated[float | None, Gt(0), Doc("main memory on each of them, in GB")] = None
    max_parallel: Annotated[int, Ge(1), Doc("jobs of a sweep that run at once")] = 256
    max_requeues: Annotated[int, Ge(0), Doc("how often a job whose time is up is queued again to go on")] = 3
    signal_delay_s: Annotated[int, Ge(1), Doc("seconds before its end in which a job saves a checkpoint")] = 120
    sbatch: Annotated[dict[str, Any], Doc("further options of sbatch, e.g. {exclude: node7}")] = field(
        default_factory=dict
    )


@dataclass
class SweepArgs:
    search: SearchArgs = field(default_factory=SearchArgs)


_STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

# Python lays out the fields of the last base first: read each list from its end.


@dataclass
class TrainConfig(
    OutputArgs, SeedArgs, EvalDataArgs, LoopArgs, LaunchArgs, PlanArgs, HardwareArgs, SpeedArgs, MethodArgs,
    PrecisionArgs, LossArgs, OptimArgs, RowArgs, ColumnArgs, DataArgs, TrustArgs, ModelArgs,
):  # fmt: skip
    __pydantic_config__ = _STRICT


@dataclass
class PlanConfig(ProbeArgs, TrainConfig):
    """The settings of the training that it stands before, and its own."""

    __pydantic_config__ = _STRICT


@dataclass
class DataPushConfig(DataPushArgs):
    __pydantic_config__ = _STRICT


@dataclass
class EvalConfig(
    GateHolder,
    OutputArgs,
    SeedArgs,
    HardwareArgs,
    PrecisionArgs,
    EvalArgs,
    EvalDataArgs,
    TunedEvalArgs,
    TrustArgs,
    TokenizationArgs,
    TunedTaskArgs,
    TunedArgs,
):
    __pydantic_config__ = _STRICT


@dataclass
class BaselineConfig(
    GateHolder, OutputArgs, SeedArgs, HardwareArgs, PrecisionArgs, EvalArgs, EvalDataArgs, TrustArgs, ModelArgs
):
    __pydantic_config__ = _STRICT


@dataclass
class PublishConfig(GateHolder, OutputArgs, HardwareArgs, PublishArgs, TrustArgs, TunedArgs):
    __pydantic_config__ = _STRICT


@dataclass
class PublishHfConfig(PublishConfig):
    """publish with target=hub as its default."""

    __pydantic_config__ = _STRICT

    target: Annotated[TargetName, Doc("hub: publish-hf is publish target=hub")] = "hub"


@dataclass
class CompareConfig(GateHolder, OutputArgs, CompareArgs):
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
