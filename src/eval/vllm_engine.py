"""engine=vllm: generation with vLLM, which does its own batching. Tested with a stand-in only, never with vLLM.

`LLM.generate` takes token ids, so vLLM gets the very prompts that transformers gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..model.source import TunedModel
from ..schema import EvalArgs

if TYPE_CHECKING:
    from .generate import Generation

# Arguments of transformers.GenerationConfig with the same meaning in vllm.SamplingParams, and their names there.
SAMPLING_PARAMS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens",
}  # fmt: skip
MAX_LORA_RANK = 512


def check_settings(task: str, generation: Mapping[str, Any]) -> None:
    """Raises: ConfigError if vLLM is not installed, or does not support the task or a setting."""
    if not find_spec("vllm"):
        raise ConfigError(
            "engine=vllm: vllm is not installed", hint="pip install vllm, or set engine=transformers"
        )
    if task != "causal_lm":
        raise ConfigError(f"engine=vllm is not supported with task={task}", hint="set engine=transformers")
    if unknown := sorted(generation.keys() - SAMPLING_PARAMS.keys() - {"do_sample"}):
        raise ConfigError(
            *(f"generation.{name} is not supported with engine=vllm" for name in unknown),
            hint="set engine=transformers",
        )


class VllmGenerator:
    """Generates for batches of prompts with a base model and, where `tuned` is an adapter, that adapter."""

    unpadded = False

    def __init__(
        self, location: str, tuned: TunedModel | None, stop_token_ids: Sequence[int], dtype: str, args: EvalArgs,
        seed: int, trust_remote_code: bool,
    ) -> None:  # fmt: skip
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        adapter = tuned is not None and tuned.is_adapter
        more = {"enable_lora": True, "max_lora_rank": MAX_LORA_RANK} if adapter else {}
        self.llm = LLM(model=location, dtype=dtype, seed=seed, trust_remote_code=trust_remote_code, **more)
        self.lora = LoRARequest("tuned", 1, str(tuned.folder)) if tuned and adapter else None
        self.seed, self.end_ids = seed, list(stop_token_ids)
        given = {SAMPLING_PARAMS[k]: value for k, value in args.generation.items() if k in SAMPLING_PARAMS}
        self.settings = {"temperature": 1.0} | given
        if not args.generation.get("do_sample", False):
            self.settings["temperature"] = 0.0  # greedy, whatever top_p is
        self.settings |= {
            "max_tokens": args.max_new_tokens, "stop": list(args.stop), "stop_token_ids": self.end_ids
        }  # fmt: skip
        self.params = SamplingParams

    def __call__(self, prompts: Sequence[list[int]], number: int) -> list[Generation]:
        params = self.params(**self.settings, seed=self.seed + number)
        inputs = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False, lora_request=self.lora)
        return [self._generation(each.outputs[0]) for each in outputs]

    def _generation(self, output: Any) -> Generation:
        from .generate import Generation

        ended = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
        count = sum(token not in self.end_ids for token in output.token_ids)
        return Generation(output.text, count, "end" if ended else str(output.finish_reason))
