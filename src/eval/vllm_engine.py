"""engine=vllm: answers by vLLM, which batches for itself. Written after its documentation, and run nowhere yet.

Its `LLM.generate` takes token ids as prompts, so that it answers the very prompts that transformers would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from src.errors import ConfigError
from src.eval.answers import Generation
from src.model.source import Tuned

# Arguments of transformers.GenerationConfig that mean the same to vllm.SamplingParams, by its names for them.
SAME = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens",
}  # fmt: skip
HIGHEST_RANK = 512


def refuse(task: str, generation: Mapping[str, Any]) -> None:
    """Raises: ConfigError if vLLM is not there, or cannot do what is asked."""
    if not find_spec("vllm"):
        raise ConfigError(
            "engine=vllm: vllm is not installed", hint="pip install vllm, or set engine=transformers"
        )
    if task != "causal_lm":
        raise ConfigError(f"engine=vllm has no meaning with task={task}", hint="set engine=transformers")
    if unknown := sorted(generation.keys() - SAME.keys() - {"do_sample"}):
        raise ConfigError(
            *(f"generation.{name} cannot be told to vllm" for name in unknown), hint="set engine=transformers"
        )


class VllmGenerator:
    """Answers batches of prompts with a base model and, where `tuned` is an adapter, that adapter over it."""

    unpadded = False

    def __init__(self, location: str, tuned: Tuned | None, tokenizer: Any, dtype: str, cfg: Any) -> None:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        adapter = tuned is not None and tuned.is_adapter
        more = {"enable_lora": True, "max_lora_rank": HIGHEST_RANK} if adapter else {}
        self.llm = LLM(model=location, dtype=dtype, seed=cfg.seed, trust_remote_code=cfg.trust_remote_code, **more)
        self.lora = LoRARequest("tuned", 1, str(tuned.folder)) if tuned and adapter else None
        self.seed, self.end = cfg.seed, tokenizer.eos_token_id
        given = {SAME[name]: value for name, value in cfg.generation.items() if name in SAME}
        self.settings = {"temperature": 1.0} | given
        if not cfg.generation.get("do_sample", False):
            self.settings["temperature"] = 0.0  # which is greedy, whatever top_p says
        self.settings |= {"max_tokens": cfg.max_new_tokens, "stop": list(cfg.stop), "stop_token_ids": [self.end]}
        self.params = SamplingParams

    def __call__(self, prompts: Sequence[list[int]], number: int) -> list[Generation]:
        params = self.params(**self.settings, seed=self.seed + number)
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        made = self.llm.generate(asked, params, use_tqdm=False, lora_request=self.lora)
        return [self._read(each.outputs[0]) for each in made]

    def _read(self, output: Any) -> Generation:
        ended = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
        count = sum(token != self.end for token in output.token_ids)
        return Generation(output.text, count, "end" if ended else str(output.finish_reason))
