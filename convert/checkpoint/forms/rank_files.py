"""The reference engine's rank files: the release's names and numbers, FP4 tagged F4, and a config of the engine's own.

The engine's config has what its forward pass reads. The rest of config.json is the same in every release of V4, so that
the file can be made again: only `transformers_version`, which says who wrote it, is not.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from dsv4.convert.checkpoint.config import Config
from dsv4.convert.checkpoint.editions.spellings import is_engine_config, release_view
from dsv4.convert.checkpoint.editions.v4 import QUANTIZATION

from .form import Released
from .tensor import TensorInfo

# What config.json of every release of V4 says, and the engine's config does not.
CONSTANTS: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,  # also where there are three draft stages
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def _packed(info: TensorInfo) -> TensorInfo:
    """FP4 as a release tags it: bytes of two codes, I8."""
    if info.dtype != "F4" or not info.shape or info.shape[-1] % 2:
        return info
    return info._replace(dtype="I8", shape=(*info.shape[:-1], info.shape[-1] // 2))


class RankFiles(Released):
    """Reads the tensors and the config as a release has them."""

    def tensors(self, stored: Mapping[str, TensorInfo]) -> Iterable[TensorInfo]:
        """The same tensors; FP4 as I8."""
        return map(_packed, stored.values())

    def stored_config(self, config: Config) -> dict[str, Any]:
        """The release's: weights are stored as there."""
        return self.released_config(config)

    def released_config(self, config: Config) -> dict[str, Any]:
        """config.json of the release; a config that is not the engine's is taken as it is."""
        if not is_engine_config(config):
            return dict(config)
        view = release_view(config)
        if "n_mtp_layers" in config and "norm_eps" in config:  # of the editions with three, the one with vision says it
            view["num_nextn_predict_layers"] = config["n_mtp_layers"]
        return {**CONSTANTS, **view, "quantization_config": {**QUANTIZATION, **view["quantization_config"]}}


RANK_FILES = RankFiles()
