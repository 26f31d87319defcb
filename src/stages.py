"""The stages of the command line: one entry in STAGES holds all that the command line knows of a stage.

To add a stage, write its function, its settings (a dataclass in src/schema.py) and its file in configs/, and enter
it here. Nothing but the standard library is imported: `--help` reads this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple


class Flag(NamedTuple):
    """A flag that sets `setting`: to `value` or, where that is empty, to the word after the flag.

    Args:
        metavar: what `--help` calls that word.
    """

    setting: str
    value: str = ""
    metavar: str = ""


class Stage(NamedTuple):
    """A stage of the pipeline.

    Args:
        function: `.module:name` of the function that is called with the validated settings. It returns an exit
            code, or None for 0.
        schema: class of the settings in src/schema.py.
        config_name: its file in configs/, without .yaml.
        summary: what it does, in one sentence.
        inherits: `.module:name` of a function that returns, for composed settings, those of the run that they are
            about. They count where neither the stage's file, nor a preset, nor the command line sets them. It must
            not need torch.
        check: `.module:name` of a function that returns what is wrong with composed settings beyond their schema.
            It must not need torch.
        positionals: settings that are written without their names, in this order.
        flags: flags in addition to those of every stage.
        notes: paragraphs for the end of `--help`.
    """

    function: str
    schema: str
    config_name: str
    summary: str
    inherits: str = ""
    check: str = ""
    positionals: tuple[str, ...] = ()
    flags: Mapping[str, Flag] = {}
    notes: tuple[str, ...] = ()

    def problems(self, values: Mapping[str, Any]) -> list[str]:
        """What `check` finds wrong with composed settings, one sentence each."""
        return list(import_function(self.check)(values)) if self.check else []

    def inherited(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that `inherits` finds for composed settings."""
        return dict(import_function(self.inherits)(values)) if self.inherits else {}


def import_function(path: str) -> Any:
    """The function at `module:name`, the module relative to this package, as in `.train.pipeline:train`."""
    module, name = path.split(":")
    return getattr(import_module(module, __package__), name)


METRICS = ".eval.metrics:unknown"  # which of some names are no metrics
PARENT, TRAINING_PROBLEMS = ".train.parent:settings", ".train.parent:problems"
FROM_RUN = (
    "what is not set comes from the run: from its training settings, then from its last evaluation; setting=null",
    "  typed on the command line means none of both (docs/evaluation.md).",
)
RUN_OF_MODEL = ".eval.inherit:of_model"
FORCE = {"--force": Flag("force", "true")}
STOPPING = (
    "stopping: the first SIGTERM, SIGINT or SIGHUP ends the run after the step, with a checkpoint and exit code "
    "75; a second one at once, with 143 or 130. touch RUN/checkpoint-now saves a checkpoint and continues.",
)
PUBLISH_CODES = (
    "exit codes: 0 published; 2 wrong input; 3 not better than the base, or damaged; 4 inconclusive (too "
    "few examples). force=true publishes in spite of 3 and 4, which the model card states.",
)

STAGES = {
    "check-data": Stage(
        ".train.prepare:check_data", "TrainConfig", "train",
        "Show which rows a training run would use, and which not.",
        inherits=PARENT, check=TRAINING_PROBLEMS,
    ),
    "plan": Stage(
        ".train.plan:plan", "PlanConfig", "train",
        "Estimate the steps, memory, disk and time of a training run.",
        inherits=PARENT, check=TRAINING_PROBLEMS,
    ),
    "train": Stage(
        ".train.pipeline:train", "TrainConfig", "train",
        "Fine-tune a model on your data.",
        inherits=PARENT, check=TRAINING_PROBLEMS, notes=STOPPING,
    ),
    "data-push": Stage(
        ".data.lakefs_push:push_dataset", "DataPushConfig", "data_push",
        "Commit a folder to a lakeFS branch.",
    ),
    "eval": Stage(
        ".eval.evaluator:evaluate", "EvalConfig", "eval",
        "Evaluate a tuned model and compare it with its base.",
        inherits=RUN_OF_MODEL, positionals=("model_path",), notes=FROM_RUN,
    ),
    "eval-baseline": Stage(
        ".eval.evaluator:evaluate_baseline", "BaselineConfig", "eval_baseline",
        "Evaluate the base model.",
        inherits=".eval.inherit:of_base", notes=FROM_RUN,
    ),
    "compare": Stage(
        ".eval.compare:compare_runs", "CompareConfig", "compare",
        "Compare two evaluated runs, or a run with its base.",
        inherits=".eval.inherit:of_compared", positionals=("run_a", "run_b"), notes=FROM_RUN,
    ),
    "report": Stage(
        ".eval.report.page:report", "ReportConfig", "report",
        "Write the report.html of a run.",
        positionals=("model_path",),
    ),
    "validate": Stage(
        ".deploy.validate:validate", "ValidateConfig", "validate",
        "Check that the files of a training run are complete and its model works.",
        inherits=RUN_OF_MODEL, positionals=("model_path",),
        flags={
            "--training-info": Flag("training_info", metavar="FILE"),
            "--model-path": Flag("model_path", metavar="DIR"),
            "--profile-path": Flag("profile_path", metavar="FILE"),
        },
    ),
    "publish": Stage(
        ".deploy.push:publish", "PublishConfig", "publish",
        "Publish a model that beats its base to artifacts/models, or with target=hub to the Hub.",
        inherits=RUN_OF_MODEL, check=".deploy.hub_settings:problems",
        positionals=("model_path",), flags=FORCE, notes=PUBLISH_CODES,
    ),
    "publish-hf": Stage(
        ".deploy.push:publish", "PublishHfConfig", "publish",
        "Publish a model that beats its base to the Hub: publish target=hub.",
        inherits=RUN_OF_MODEL, check=".deploy.hub_settings:publish_hf_problems", positionals=("model_path",),
        flags={"--repo": Flag("repo_id", metavar="USER/NAME"), "--public": Flag("private", "false"), **FORCE},
        notes=PUBLISH_CODES,
    ),
}  # fmt: skip

NO_EVAL_LOSS = ".data.eval_files:why_no_eval_loss"  # of the settings of a training run
SWEEP_STAGE = "train"  # its jobs are the trials of a sweep, ranked by a figure of their runs
