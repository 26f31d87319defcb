"""References of settings to environment variables, `${oc.env:NAME}`: their values are secret, whatever the NAME.

Names, numbers and choices are not secret: stages look them up in the records of a run.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from omegaconf import Node, OmegaConf
from omegaconf.resolvers import oc

from . import config, schema
from .stages import STAGES
from .utils.secrets import refer_to

NAMES = {
    "model_name", "model_revision", "model_path", "dataset_path", "dataset_pattern", "path", "pattern",
    "repo", "branch", "tag", "commit", "revision", "bucket", "sha256", "cache_dir", "eval_path",
    "output_dir", "artifacts_dir", "publish_name", "repo_id", "run_a", "run_b", "resume", "training_info",
    "profile_path", "splits", "split", "dev_split", "metrics", "metric", "chat_template", "question_key",
    "answer_key", "label_key", "csv_delimiter", "encoding", "lora_target_modules", "cuda_visible_devices",
    "report_to", "master_addr", "message", "license", "init_from",
}  # fmt: skip
# Variables that name something by their own name, as in run_name=${oc.env:JOB_NAME}
NAMING_VARIABLE = re.compile(
    r"(^|_)(\w*NAME|USER|ID|HOST|DIR|FOLDER|PATH|HOME|ROOT)$|^SLURM_|^CUDA_", re.IGNORECASE
)


def register() -> None:
    """Make OmegaConf's resolver of `${oc.env:NAME}` note the variables that hold secrets."""
    OmegaConf.register_new_resolver("oc.env", _resolve, replace=True)


def _resolve(name: str, *default: Any, _node_: Node) -> Any:
    if may_be_secret(str(_node_._get_full_key(None))) and not NAMING_VARIABLE.search(name):
        refer_to(name)
    return oc.env(name, *default)


def may_be_secret(key: str) -> bool:
    """Whether the value of a setting may be a secret; `key` may be dotted, with indexes of lists.

    >>> [may_be_secret(key) for key in ("run_name", "trainer.hub_token", "lr", "model_name")]
    [True, True, False, False]
    """
    parts = re.sub(r"\[\d+\]", "", key).split(".")
    if parts[0] == "hydra" or (parts[-1] in NAMES and parts[0] not in _free_groups()):
        return False
    return parts[0] in _free_groups() or parts[-1] in _texts()


@cache
def _free_groups() -> frozenset[str]:
    """The settings that are passed on to a library: dicts of any keys."""
    hints = [config.type_hints(config.schema_of(stage)) for stage in STAGES] + [
        config.type_hints(schema.SlurmConfig)
    ]
    return frozenset(key for each in hints for key, hint in each.items() if "dict[" in str(hint))


@cache
def _texts() -> frozenset[str]:
    """The last part of the name of every setting that is a text or a list of texts."""
    schemas = [config.schema_of(stage) for stage in STAGES] + [schema.Dataset, schema.DataSource]
    keys = [(each, key) for each in schemas for key in config.flat_keys(each)]
    return frozenset(
        key.rpartition(".")[2] for each, key in keys if config.is_text(each, key) or config.is_word_list(each, key)
    )
