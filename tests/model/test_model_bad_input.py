"""What a user can get wrong: each an error of the right class that names the tensor or value, never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.errors import InputError, MachineError, UsageError
from dsv4.model import load
from dsv4.model.config import Config
from dsv4.model.transformer import Transformer

GEOMETRY = Geometry(
    compress_ratios=(4, 0), vocab_size=64, hidden_size=128, n_routed_experts=4, max_position_embeddings=20
)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load(make_checkpoint(tmp_path_factory.mktemp("good") / "c", geometry=GEOMETRY, tokenizer=False))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, dict[str, Any]]:
    folder = make_checkpoint(tmp_path_factory.mktemp("parts") / "c", geometry=GEOMETRY, tokenizer=False)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return tensors, json.loads((folder / "config.json").read_text())


def rewritten(folder: Path, parts: tuple[Tensors, dict[str, Any]], tensors: Tensors, **config: Any) -> Path:
    """The checkpoint with these tensors and config values instead; a value of None removes the key."""
    kept = {name: tensor for name, tensor in (parts[0] | tensors).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    values = {key: value for key, value in (parts[1] | config).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_the_rewritten_checkpoint_is_good(tmp_path: Path, parts: Any) -> None:
    assert load(rewritten(tmp_path, parts, {})).has_mtp


def test_codes_and_scales_that_are_declared_as_bytes(tmp_path: Path, model: Transformer, parts: Any) -> None:
    """U8, as other tools write FP4: the same bits."""
    as_bytes = {n: t.view(torch.uint8) for n, t in parts[0].items() if t.dtype in (torch.int8, torch.float8_e8m0fnu)}
    found = load(rewritten(tmp_path, parts, as_bytes))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    logits = [m.forward(ids, m.new_cache(1)).logits for m in (found, model)]
    assert len(as_bytes) > 20 and torch.equal(*logits)


CONFIGS = [
    ({"hidden_size": 256}, r"'embed.weight' is BF16 \[64, 128\], config.json asks for \[64, 256\]"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"vocab_size": "64"}, "vocab_size must be an integer, it is '64'"),
    ({"vocab_size": True}, "vocab_size must be an integer, it is True"),
    ({"head_dim": -4}, "head_dim must be positive, it is -4"),
    ({"compress_ratios": [4, 7]}, "compress_ratios must be a list of"),
    ({"compress_ratios": []}, "compress_ratios has fewer entries than layers"),
    ({"compress_ratios": [4]}, r"compress_ratios has no entry for 1 draft stage\(s\)"),
    ({"num_hidden_layers": 2, "compress_ratios": [4, 4, 0]}, "'layers.1.hc_attn_fn' is missing|'layers.1.attn_norm"),
    ({"n_routed_experts": 5}, r"'layers.0.ffn.experts.4.w1.weight' is missing"),
    ({"num_hash_layers": 0}, r"'layers.0.ffn.gate.bias' is missing"),
    ({"o_groups": 3}, "o_groups does not divide num_attention_heads"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok exceeds n_routed_experts"),
    ({"index_head_dim": 96}, "index_head_dim is not a power of two"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is odd"),
    ({"scoring_func": "softmax"}, "scoring_func is 'softmax', this engine runs scoring_func = 'sqrtsoftplus'"),
    ({"model_type": "deepseek_v9"}, "model_type is 'deepseek_v9', this engine runs deepseek_v41, deepseek_v4, "),
    (
        {"model_type": "deepseek_v41"},
        r"describes V4.1 \(model_type is 'deepseek_v41'\), '.*(hc_head_fn|ape|tid2eid)' is a tensor of V4",
    ),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling must be of type 'yarn', it is 'linear'"),
    ({"rope_scaling": {"type": "yarn"}}, "factor is missing"),
    ({"quantization_config": {"weight_block_size": [128]}}, r"weight_block_size is \[128\], two counts expected"),
    (
        {"quantization_config": {"weight_block_size": [32, 32]}},
        r"block scale of shape \[1, 1\]; \[4, 4\] expected, one per 32 x 32",
    ),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS, ids=[str(c)[:50] for c, _ in CONFIGS])
@pytest.mark.fast_cases(7)
def test_config_that_does_not_fit(tmp_path: Path, parts: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(rewritten(tmp_path, parts, {}, **config))


W1 = "layers.0.ffn.experts.1.w1"
WKV = "layers.0.attn.wkv"
TENSORS: list[tuple[str, Callable[[Tensors], Tensors], str]] = [
    ("scale lost", lambda t: {f"{W1}.scale": None}, f"'{W1}.weight': I8 weight without a block scale"),
    ("weight lost", lambda t: {f"{WKV}.weight": None}, f"'{WKV}.weight' is missing"),
    ("cut", lambda t: {f"{WKV}.weight": t[f"{WKV}.weight"][:8]}, f"'{WKV}.weight' is F8_E4M3"),
    ("FP8, scale of FP4", lambda t: {f"{W1}.weight": torch.zeros(128, 128).to(torch.float8_e4m3fn)}, f"'{W1}.scale'"),
    ("float16", lambda t: {f"{WKV}.weight": torch.zeros(128, 128).half()}, "is F16, which this engine has no decoder"),
    ("BF16 scale", lambda t: {f"{WKV}.scale": t[f"{WKV}.scale"].to(torch.bfloat16)},
     f"'{WKV}.scale': block scale of dtype BF16"),
    ("FP8 embedding",
     lambda t: {"embed.weight": torch.zeros(64, 128).to(torch.float8_e4m3fn), "embed.scale": torch.ones(1, 1)},
     "'embed.weight' is F8_E4M3, which this engine has no decoder"),
    ("float table", lambda t: {"layers.0.ffn.gate.tid2eid": torch.zeros(64, 3)}, "a table of expert ids must be I64"),
    ("NaN", lambda t: {f"{WKV}.weight": torch.full((128, 128), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)},
     f"'{WKV}.weight' holds a NaN"),
    ("no such expert", lambda t: {"layers.0.ffn.gate.tid2eid": torch.full((64, 3), 4)}, "names expert 4, there are 4"),
    ("NaN scale", lambda t: {f"{W1}.scale": torch.full((128, 4), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)},
     f"'{W1}.scale' holds a NaN or a value that is not positive"),
    ("zero scale", lambda t: {f"{WKV}.scale": torch.zeros(1, 1)}, f"'{WKV}.scale' holds a NaN or a value that is not"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in TENSORS], ids=[row[0] for row in TENSORS])
def test_tensors_that_do_not_fit(
    tmp_path: Path, parts: Any, change: Callable[[Tensors], Tensors], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(rewritten(tmp_path, parts, change(parts[0])))


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta-physics", ""])
def test_device_that_is_not_there(model: Transformer, name: str) -> None:
    with pytest.raises(MachineError, match=f"there is no device '{name}' here"):
        load(model.store.checkpoint, device=name)


@pytest.mark.parametrize("token", [-1, 64, 2**40])
def test_token_id_out_of_range(model: Transformer, token: int) -> None:
    with pytest.raises(UsageError, match=rf"token id {token} is not in 0\.\.63"):
        model.forward(torch.tensor([[0, token]]), model.new_cache(1))


def test_context_that_is_too_long(model: Transformer) -> None:
    cache = model.new_cache(1)
    model.forward(torch.zeros(1, 18, dtype=torch.int64), cache)
    with pytest.raises(UsageError, match="would have 21 tokens, this model has room for 20"):
        model.forward(torch.zeros(1, 3, dtype=torch.int64), cache)
    model.forward(torch.zeros(1, 2, dtype=torch.int64), cache)  # the refused call left nothing behind


def test_shapes_that_do_not_fit(model: Transformer) -> None:
    with pytest.raises(UsageError, match=r"token ids have shape \[2, 3\], \[1, tokens\] is expected"):
        model.forward(torch.zeros(2, 3, dtype=torch.int64), model.new_cache(1))
    with pytest.raises(UsageError, match=r"takes a tensor and a cache, not list and NoneType\n  Make a cache"):
        model.forward([[0, 1]], None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="lengths"):
        model.forward(torch.zeros(1, 3, dtype=torch.int64), model.new_cache(1), lengths=[4])


def test_no_mtp_block(tmp_path: Path, parts: Any) -> None:
    gone = dict.fromkeys(name for name in parts[0] if name.startswith("mtp."))
    model = load(rewritten(tmp_path, parts, gone))
    assert not model.has_mtp
    with pytest.raises(UsageError, match="no MTP block"):
        model.mtp_logits(torch.zeros(1, 1, 4, 128), torch.zeros(1, 1, dtype=torch.int64), model.new_cache(1))


def test_released_configs_are_understood() -> None:
    """The values that matter of Flash, as its config.json has them."""
    from dsv4.convert.synthetic.geometry import config

    values = config(Geometry()) | {"some_key_of_another_program": 1}
    parsed = Config.from_json(values)
    assert parsed.rope_scaling is not None and parsed.rope_scaling.factor == 8
    assert (parsed.hidden_size, parsed.compress_ratios) == (256, (0, 4, 128, 4, 0))
