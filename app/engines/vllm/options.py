"""`[models.NAME.options]` of the engine `vllm`, as far as they can be judged without vLLM.

`python` names the interpreter that has vLLM. All others are vLLM's own engine arguments, by its
names (`tensor_parallel_size`, `quantization`, `gpu_memory_utilization`, …), but for those that
follow from the model's settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from app.config.settings import ModelSettings
from app.engines.checkpoint.json_files import read_json
from app.errors import ConfigError

OURS: Final = {
    "model": "source",
    "tokenizer": "source",
    "revision": "revision",
    "dtype": "dtype",
    "max_model_len": "context_tokens",
    "max_num_seqs": "max_batch_size",
    "enable_lora": "adapters",
    "lora_modules": "adapters",
}
"""Engine arguments that have another name in a model's settings."""

FIXED: Final = frozenset({"trust_remote_code", "scheduling_policy", "disable_log_stats"})
"""Engine arguments that are not anybody's to choose."""


def check(settings: ModelSettings) -> None:
    """Raises `ConfigError` for what cannot be right, whatever the version of vLLM."""
    for name in settings.options:
        if name in OURS:
            raise ConfigError(f"The option {name} is set by the model's own key {OURS[name]}.")
        if name in FIXED:
            raise ConfigError(f"The option {name} of the engine vllm cannot be chosen.")
    if not isinstance(settings.options.get("python", ""), str):
        raise ConfigError(
            "The option python is the interpreter of an environment that has vLLM, as in "
            '"/opt/vllm/bin/python".'
        )


def largest_rank(settings: ModelSettings) -> int:
    """Of the model's adapters, as vLLM has to make room for.

    Raises `ConfigError` for a folder without one; only workers need have them.
    """
    ranks = []
    for name, folder in settings.adapters.items():
        file = Path(folder).expanduser() / "adapter_config.json"
        if not file.is_file():
            raise ConfigError(f"The adapter {name}: {folder} has no adapter_config.json.")
        ranks.append(int(read_json(file).get("r", 8)))
    return max(ranks)
