"""config.json of a DeepSeek-V4 release as one frozen dataclass, fields named as the release names them.

Only what the forward pass needs is kept. Keys that would change the arithmetic must have the value that this engine
implements (`Config.FIXED`); anything else in the file, from generation defaults to fields of other programs, is left
alone. The number of MTP blocks is not read from `num_nextn_predict_layers`, which is wrong in several releases, but
from the tensor names (`weights.mtp_stages`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from dsv4.convert.checkpoint.config import quantization, required_number, required_weight_block
from dsv4.convert.checkpoint.editions.table import check_config
from dsv4.convert.checkpoint.names import Stack
from dsv4.errors import InputError

LARGEST_DRAFT_BLOCK = 64  # the releases draft 5 tokens; a hostile config must not ask for all of memory
OVERLAP_RATIO = 4  # the ratio whose blocks overlap and have an indexer


@dataclass(frozen=True)
class RopeScaling:
    """YaRN, applied on layers with a compress ratio only."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DSparkConfig:
    """The draft stages of a DSpark edition: tokens in a block, the token that fills it, and where they read.

    target_layer_ids: the layers of the main stack, ascending, whose streams the stages are given.
    n_routed_experts, num_experts_per_tok: of the stages; V4 has no keys for them, they are the main stack's.
    """

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int
    n_routed_experts: int
    num_experts_per_tok: int

    def problems(self, config: "Config") -> Iterator[tuple[bool, str]]:
        """Whether something does not fit the model, and what."""
        targets = self.target_layer_ids
        yield self.block_size > LARGEST_DRAFT_BLOCK, f"dspark_block_size exceeds {LARGEST_DRAFT_BLOCK}"
        yield self.noise_token_id >= config.vocab_size, "dspark_noise_token_id is not in the vocabulary"
        yield list(targets) != sorted(set(targets)), "dspark_target_layer_ids must be in ascending order"
        yield any(t not in range(config.num_hidden_layers) for t in targets), "dspark_target_layer_ids names no layer"
        stages = config.compress_ratios[config.num_hidden_layers :]
        yield any(stages), "compress_ratios of the draft stages are not 0"
        beyond = self.num_experts_per_tok > self.n_routed_experts
        yield beyond, "dspark_num_experts_per_tok exceeds dspark_n_routed_experts"


@dataclass(frozen=True)
class Config:
    """Dimensions and constants of one model."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]  # one per layer, then one per MTP block
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None
    dspark: DSparkConfig | None

    # The values that the forward pass implements. A config with others describes another architecture.
    FIXED: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "hidden_act": "silu",
        "model_type": "deepseek_v4",
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "scoring_func": "sqrtsoftplus",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
    }
    RATIOS: ClassVar[tuple[int, ...]] = (0, 4, 128)
    gate_epsilon: ClassVar[float] = 0.0  # added to the sum of the chosen experts' scores
    shares_index_keys: ClassVar[bool] = False  # between layers
    smallest_indexed_ratio: ClassVar[int] = OVERLAP_RATIO

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """The parsed config.json of a checkpoint. Raises InputError for a missing, mistyped or impossible value."""
        for key, value in cls.FIXED.items():
            if key in config and config[key] != value:
                raise InputError(f"config.json: {key} is {config[key]!r}, this engine runs {key} = {value!r}")
        special = cls._special(config)
        values = {f.name: required_number(config, f.name, f.type is int) for f in fields(cls) if f.name not in special}
        result = cls(**values, **special)
        check_config(config)
        if "weight_block_size" in quantization(config):
            required_weight_block(config)
        for wrong, text in result._problems():
            if wrong:
                raise InputError(f"config.json: {text}")
        return result

    @classmethod
    def _special(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that are not plain numbers. Raises InputError."""
        scaling = _rope_scaling(config.get("rope_scaling"))
        return {
            "compress_ratios": _ratios(config, cls.RATIOS),
            "rope_scaling": scaling,
            "dspark": dspark_config(config),
        }

    def _problems(self) -> Iterator[tuple[bool, str]]:
        """Whether something is wrong, and what: dimensions that do not divide or that exceed one another."""
        yield len(self.compress_ratios) < self.num_hidden_layers, "compress_ratios has fewer entries than layers"
        yield self.num_attention_heads % self.o_groups > 0, "o_groups does not divide num_attention_heads"
        yield self.qk_rope_head_dim % 2 > 0, "qk_rope_head_dim is odd"
        yield self.qk_rope_head_dim > self.head_dim, "qk_rope_head_dim exceeds head_dim"
        yield self.qk_rope_head_dim > self.index_head_dim, "qk_rope_head_dim exceeds index_head_dim"
        yield self.index_head_dim & (self.index_head_dim - 1) > 0, "index_head_dim is not a power of two"
        yield self.num_experts_per_tok > self.n_routed_experts, "num_experts_per_tok exceeds n_routed_experts"
        if self.dspark is not None:
            yield from self.dspark.problems(self)

    def routed_experts(self, stack: Stack) -> int:
        """Experts of a layer, or of a draft stage."""
        return self.n_routed_experts if stack == "layers" or self.dspark is None else self.dspark.n_routed_experts

    def of_stages(self) -> Self:
        """The config as the blocks of draft stages read it."""
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        if self.dspark is not None:
            experts, chosen = self.dspark.n_routed_experts, self.dspark.num_experts_per_tok
        return replace(self, n_routed_experts=experts, num_experts_per_tok=chosen)

    @property
    def rows_per_table(self) -> int:
        """Rows of each n-gram table that a token reads; there are none before V4.1."""
        return 0

    def ratio(self, layer: int) -> int:
        """Compress ratio of a layer; MTP block m is layer num_hidden_layers + m."""
        return self.compress_ratios[layer]

    def kept_ratio(self, layer: int) -> int:
        """Compress ratio of the keys that a layer keeps itself; 0 for none."""
        return self.ratio(layer)


def _ratios(config: Mapping[str, Any], known: tuple[int, ...]) -> tuple[int, ...]:
    ratios = config.get("compress_ratios")
    if not isinstance(ratios, list) or any(r not in known or isinstance(r, bool) for r in ratios):
        raise InputError(f"config.json: compress_ratios must be a list of {known}, one per layer")
    return tuple(ratios)


def _rope_scaling(scaling: Any) -> RopeScaling | None:
    if scaling is None:
        return None
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else scaling
    if kind != "yarn":
        raise InputError(f"config.json: rope_scaling must be of type 'yarn', it is {kind!r}")
    return RopeScaling(
        factor=required_number(scaling, "factor", False),
        beta_fast=required_number(scaling, "beta_fast", False),
        beta_slow=required_number(scaling, "beta_slow", False),
        original_max_position_embeddings=required_number(scaling, "original_max_position_embeddings", True),
    )


def dspark_config(config: Mapping[str, Any], experts: str = "") -> DSparkConfig | None:
    """The keys `dspark_*`; None in an edition without. Raises InputError for some of them without the others.

    experts: what the keys for the experts of the stages begin with; "" where the main stack's count for them too.
    """
    if "dspark_block_size" not in config:
        return None
    targets = config.get("dspark_target_layer_ids")
    if not isinstance(targets, list) or not targets or any(type(target) is not int for target in targets):
        raise InputError("config.json: dspark_target_layer_ids must be a list of layers")
    return DSparkConfig(
        block_size=required_number(config, "dspark_block_size", True),
        noise_token_id=required_number(config, "dspark_noise_token_id", True),
        target_layer_ids=tuple(targets),
        markov_rank=required_number(config, "dspark_markov_rank", True),
        n_routed_experts=required_number(config, f"{experts}n_routed_experts", True),
        num_experts_per_tok=required_number(config, f"{experts}num_experts_per_tok", True),
    )
