"""The forms of a published model: each loads on its own and reproduces the adapter's outputs, or is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.tiny_model import build
from src.deploy import export
from src.deploy.model_card import render_card
from src.deploy.usage_snippets import usage
from src.errors import ModelError, RunError
from src.eval import merge_check, reevaluate
from src.model import adapters, load, methods, tasks
from src.model.methods import METHODS
from src.model.source import locate, locate_tuned
from src.runs import Run
from src.schema import MethodArgs, PublishConfig
from src.utils.files import hash_files
from tests.deploy.cards import PROMOTED, answer_of
from tests.fixtures import ANSWER, ROOT, World, evals, tree

pytest_plugins = ["tests.fixtures"]

MERGED = PublishConfig(export="merged", cuda_visible_devices="")


def written(run: Run, cfg: PublishConfig, folder: Path) -> tuple[Path, dict[str, Any]]:
    folder.mkdir()
    return folder, export.write_model(run, cfg, folder)


def answered(folder: Path, question: str) -> str:
    """The answer of the model in the folder, loaded without peft."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not hasattr(model, "peft_config")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=16, eos_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.fixture
def with_method(copied: World, tmp_path: Path) -> Any:
    """A function that replaces the adapter of a run by one of another method, with random weights."""

    def of(method: str) -> Run:
        run = copied.newest
        source = locate(str(copied.model))
        four_bit = METHODS[method].four_bit
        torch.manual_seed(0)
        model, source = load.load_base(source, "float32", "cpu", four_bit=four_bit)
        args = MethodArgs(method=method, lora_target_modules=None)  # type: ignore[arg-type]
        model = adapters.apply_method(model, args, source, steps=10)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        for left in run.model.glob("adapter*"):
            left.unlink()
        model.save_pretrained(run.model)
        run.update(method=method)
        return run

    return of


# Merged


def test_a_merged_model_loads_without_peft_and_reproduces_the_adapter(finished: World, tmp_path: Path) -> None:
    folder, facts = written(finished.newest, MERGED, tmp_path / "merged")
    assert {"model.safetensors", "config.json", "generation_config.json", "chat_template.jinja"} <= tree(
        folder
    ).keys()
    assert not [name for name in tree(folder) if "adapter" in name]
    assert answered(folder, "Top of ore rate?") == ANSWER
    assert facts["form"] == "merged" and facts["merged_into"] == "base model's float32 weights"
    assert facts["mean_kl"] < 1e-6 and facts["positions"] > 100
    assert (facts["metric"], facts["adapter_score"], facts["merged_score"]) == ("rougeL", 1.0, 1.0)


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.config and name != "lora"])
def test_every_method_is_merged_or_refused_with_a_reason(with_method: Any, method: str, tmp_path: Path) -> None:
    run = with_method(method)
    if METHODS[method].unmergeable:
        with pytest.raises(ModelError, match=f"A {method} adapter cannot be merged .* set export=adapter"):
            export.write_model(run, MERGED, tmp_path)
        return
    _, facts = written(run, MERGED, tmp_path / "merged")
    assert facts["mean_kl"] < 1e-5
    into = [tried["merged_into"] for tried in facts["tried"]]
    assert into == ["base model's float32 weights", *(["dequantised nf4 weights"] if method == "qlora" else [])]


def test_qlora_keeps_the_merge_with_the_smaller_divergence(with_method: Any, tmp_path: Path) -> None:
    run = with_method("qlora")
    folder, facts = written(run, MERGED, tmp_path / "merged")
    kl = {tried["merged_into"]: tried["mean_kl"] for tried in facts["tried"]}
    assert facts["merged_into"] == min(kl, key=lambda into: kl[into]) == "dequantised nf4 weights"
    assert kl["base model's float32 weights"] > 10 * facts["mean_kl"]
    # the folder has the dequantised weights of the 4-bit model plus the adapter
    own, _ = load.load_base(locate(str(folder)), "float32", "cpu")
    four, _ = load.load_base(locate(run.manifest["base_model"]["name"]), "float32", "cpu", four_bit=True)
    plain = four.dequantize(torch.float32).state_dict()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    name = "model.layers.0.mlp.down_proj.weight"
    added = own.state_dict()[name] - plain[name]
    assert (
        torch.linalg.matrix_rank(added, atol=1e-4) <= MethodArgs().lora_r
    )  # and no difference from rounding to 4 bits


def test_a_merge_that_exceeds_a_limit_is_refused_with_both_figures(
    finished: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = methods.merge

    def worse(model: Any) -> Any:
        merged = real(model)
        with torch.no_grad():
            merged.model.norm.weight.mul_(-1)  # a merge that destroys the model
        return merged

    monkeypatch.setattr(methods, "merge", worse)
    with pytest.raises(ModelError) as caught:
        written(finished.newest, MERGED, tmp_path / "refused")
    message = str(caught.value)
    assert "mean KL of " in message and "(export_max_kl=0.01)" in message
    assert "rougeL -1 on 24 examples of test (export_max_drop=0.01)" in message and "set export=adapter" in message
    allowed = replace(MERGED, export_max_kl=1e9, export_max_drop=1.0)
    assert written(finished.newest, allowed, tmp_path / "allowed")[1]["merged_score"] == 0
    for limited in (replace(allowed, export_max_kl=0.01), replace(allowed, export_max_drop=0.5)):
        with pytest.raises(ModelError, match="differs from the adapter"):
            export.write_model(finished.newest, limited, tmp_path / "allowed")


def test_a_run_that_was_not_evaluated_cannot_be_compared(copied: World, tmp_path: Path) -> None:
    (evals(copied.newest) / "config_used.yaml").unlink()
    with pytest.raises(RunError, match=r"config_used\.yaml does not exist; "):
        export.write_model(copied.newest, MERGED, tmp_path)


def test_logits_are_those_of_the_reference_answer_whose_likelihood_they_give(finished: World) -> None:
    """The mean of -log p over the kept positions is the loss that transformers computes over the same labels."""
    model, tokenizer, _ = load.load_tuned(locate_tuned(finished.newest.model), "float32", "cpu")
    evaluation = reevaluate.of_run(finished.newest, MERGED.gate, [])
    chat = reevaluate.load_chat(finished.newest.model, "causal_lm")
    example = reevaluate.reference_examples(model.config.to_dict(), chat, evaluation)[0]
    logits = merge_check.LOGITS["causal_lm"](model, example)
    answer = [i for i, on in zip(*example, strict=True) if on]
    assert tokenizer.decode(answer).startswith(ANSWER)
    found = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    expected = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([example.labels])).loss
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


# Other forms


def test_an_adapter_is_copied_byte_for_byte(finished: World, tmp_path: Path) -> None:
    run = finished.newest
    for form in (None, "adapter"):
        folder, facts = written(run, PublishConfig(export=form), tmp_path / str(form))  # type: ignore[arg-type]
        assert facts == {"form": "adapter"}
        assert hash_files(folder) == {k: v for k, v in hash_files(run.model).items() if k != "README.md"}


def test_full_weights_are_copied_and_have_no_adapter(copied: World, tmp_path: Path) -> None:
    run = copied.newest
    for file in run.model.glob("adapter*"):
        file.unlink()
    (run.model / "config.json").write_bytes((copied.model / "config.json").read_bytes())
    run.update(method="full")
    folder, facts = written(run, MERGED, tmp_path / "full")
    assert facts == {"form": "full"} and "config.json" in tree(folder)
    with pytest.raises(ModelError, match="trained all weights, so it has no adapter"):
        export.write_model(run, replace(MERGED, export="adapter"), tmp_path)


@pytest.mark.parametrize(("name", "task"), [("t5", "seq2seq"), ("bert", "classification")])
def test_onnx_of_the_other_tasks_computes_the_logits_of_torch_and_its_card_cuts_long_texts(
    tiny: Path, tmp_path: Path, name: str, task: Any
) -> None:
    """The graph is that of merged weights; the causal models have a test of their own."""
    from src.deploy import onnx

    texts = (ROOT / "data" / "ingot.jsonl").read_text(encoding="utf-8").splitlines()
    base = build(tmp_path / name, texts, architecture=name)
    settings = json.loads((base / "config.json").read_text())  # one layer: the export takes a while for each
    one = {k: 1 for k in ("num_layers", "num_decoder_layers", "num_hidden_layers") if k in settings}
    (base / "config.json").write_text(json.dumps(settings | one))
    source, folder, graph = locate(str(base)), tmp_path / "merged", tmp_path / "onnx"
    labels = ("hot", "cold") if task == "classification" else ()
    model, _ = load.load_base(source, "float32", "cpu", task=task, labels=labels)
    tuned = adapters.apply_method(model, MethodArgs("lora", lora_r=4), source, steps=1, task=task)
    methods.merge(tuned).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    shutil.copytree(folder, graph, ignore=shutil.ignore_patterns("*.safetensors"))
    prompts = [tokenizer(text)["input_ids"] for text in ("Top of mill?", "Top of the feed rate?")]
    facts = onnx.export_graph(folder, task, prompts, graph)
    assert facts["largest_logit_difference"] < 1e-4
    most = tasks.max_positions(json.loads((folder / "config.json").read_text()))
    assert bool(most) == (name == "bert")
    manifest = {"task": task, "base_model": {"name": str(base), "revision": source.revision}}
    card = "## How to use" + usage(manifest, facts | {"max_tokens": most}, "top " * (2 * most if most else 5))
    assert isinstance(answer_of(card, graph, base), str)


def test_gguf_is_refused_with_an_alternative(copied: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(copied.output.parent)
    assert copied.call("publish", "export=gguf") == 2
    error = capsys.readouterr().err
    assert "export=merged" in error and "convert_hf_to_gguf.py" in error and error.count("\n") == 1
    assert tree(copied.output.parent) == before


def test_onnx_that_is_not_installed_is_one_sentence(
    finished: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx", "onnx_is_not_here"))
    with pytest.raises(ModelError, match="needs onnx_is_not_here, which is not installed; pip install -r requi"):
        export.write_model(finished.newest, replace(MERGED, export="onnx"), tmp_path)


def test_onnx_computes_the_logits_of_torch_or_is_refused(
    finished: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.deploy import onnx

    run, cfg = finished.newest, replace(MERGED, export="onnx")
    exported: list[Any] = []
    real_export, real_load = onnx.OnnxExporter.export, AutoModelForCausalLM.from_pretrained

    def once(self: Any, *given: Any, **named: Any) -> Any:
        exported.append(exported[0] if exported else real_export(self, *given, **named))
        return exported[0]

    def other(*given: Any, **named: Any) -> Any:
        model = real_load(*given, **named)
        if isinstance(model, tuple):  # the base model of the merge
            return model
        with torch.no_grad():
            model.model.norm.weight.mul_(1.1)  # differs from the exported graph
        return model

    monkeypatch.setattr(onnx.OnnxExporter, "export", once)
    folder, facts = written(run, cfg, tmp_path / "onnx")
    assert {"model.onnx", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(tree(folder))
    assert not list(tmp_path.glob("**/*.safetensors")) and facts["merged"]["mean_kl"] < 1e-6
    assert facts["form"] == "onnx" and facts["largest_logit_difference"] < 1e-4
    card = render_card(run, "it", PROMOTED, facts)
    assert "library_name: onnx\n" in card and "without a KV cache" in card
    assert answer_of(card, folder, finished.model) == ANSWER

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", other)
    with pytest.raises(ModelError, match="the logits of onnxruntime and torch differ by "):
        export.write_model(run, cfg, folder)
    assert len(exported) == 2
