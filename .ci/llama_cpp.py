"""llama.cpp computes on a GGUF file of dsv4: its logits against those of `dsv4 run --no-simulation`.

Run by .ci/run. The prebuilt library comes from npm; where that cannot be had, one line says so and nothing is tested.
Twice: on the file as it is, where llama.cpp rounds activations to 8 bits (its arithmetic for MXFP4), and on the same
values in float32, as the library gguf decodes them, where only the order of sums differs. Then the file of DSpark's
stages: what llama.cpp reads for them in the layers of the model that the file names, and its logits of a draft.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from dsv4.convert import convert
from dsv4.convert.synthetic.checkpoint import DSpark, Geometry, make_checkpoint
from dsv4.model import load
from dsv4.model.config import Config
from dsv4.model.evaluate.logits import teacher_forced

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
TOKENS = 300
# Of the checkpoint with DSpark, and the length of the text, which the window of all stages holds with a draft.
RATIOS, DRAFT_AFTER = (0, 4, 128, 4, 0, 0, 0), 60
# Of the largest logit. float32: sums of some thousand products, in other orders. 8 bits: 2**-8 in each activation, over
# the layers; a few tokens get another expert by it, so the median of the positions counts.
FLOAT32_ERROR, EIGHT_BIT_ERROR = 1e-4, 5e-2
F32 = 0  # ggml's number of the type
KEEP_LAYER_INPUT = "_Z30llama_set_embeddings_layer_inpP13llama_contextjb"
LAYER_INPUT = "_Z30llama_get_embeddings_layer_inpP13llama_contextj"
pointer, i32, u32, f32, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_bool


def fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class ModelParams(ctypes.Structure):
    """llama_model_params of llama.cpp 0.5.0."""

    _fields_ = fields(
        (pointer, "devices overrides"),
        (i32, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
        (pointer, "tensor_split callback callback_data kv_overrides"),
        (flag, "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"),
    )


class ContextParams(ctypes.Structure):
    """llama_context_params of llama.cpp 0.5.0."""

    _fields_ = fields(
        (u32, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq"),
        (i32, "n_threads n_threads_batch ctx_type rope_scaling pooling attention flash_attn"),
        (f32, "rope_base rope_scale yarn_ext yarn_attn yarn_fast yarn_slow"),
        (u32, "yarn_orig_ctx"),
        (f32, "defrag"),
        (pointer, "cb_eval cb_eval_data"),
        (i32, "type_k type_v"),
        (pointer, "abort abort_data"),
        (flag, "embeddings offload_kqv no_perf op_offload swa_full kv_unified"),
        (pointer, "samplers"),
        (ctypes.c_size_t, "n_samplers"),
        (pointer, "ctx_other"),
    )


class Batch(ctypes.Structure):
    """llama_batch; what llama_batch_get_one makes of tokens."""

    _fields_ = fields((i32, "n_tokens"), (pointer, "token embd pos n_seq_id seq_id logits"))


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)
def errors_only(level: int, text: bytes, _: int) -> None:
    """What the library logs, if it is an error (4)."""
    if level == 4:
        print(text.decode(errors="replace"), end="")


def library(folder: Path) -> ctypes.CDLL:
    """llama.cpp with its CPU back ends. Raises RuntimeError if its structs are not those above."""
    base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(str(next(folder.glob("libggml.v*.so"))), ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(next(folder.glob("libllama.v*.so"))))
    base.ggml_log_set(errors_only, None)
    llama.llama_log_set(errors_only, None)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    for name, result, arguments in (
        ("llama_model_default_params", ModelParams, []),
        ("llama_context_default_params", ContextParams, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, ModelParams]),
        ("llama_init_from_model", pointer, [pointer, ContextParams]),
        ("llama_decode", i32, [pointer, Batch]),
        ("llama_get_logits", ctypes.POINTER(f32), [pointer]),
        ("llama_set_causal_attn", None, [pointer, flag]),
        # Functions of C++, for drafts: whether the inputs of a layer are kept, and they.
        (KEEP_LAYER_INPUT, None, [pointer, u32, flag]),
        (LAYER_INPUT, ctypes.POINTER(f32), [pointer, u32]),
    ):
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    defaults = llama.llama_context_default_params()
    if (defaults.n_ctx, defaults.n_batch, defaults.flash_attn, defaults.swa_full) != (512, 2048, -1, True):
        raise RuntimeError("llama.cpp has other structs than this script knows")
    return llama


def context_of(llama: ctypes.CDLL, file: Path, other: int | None = None) -> int:
    """A context with keys in float32 and without flash attention. other: that of the model of a file of drafts."""
    model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
    assert model, f"llama.cpp does not load {file.name}"
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = params.n_outputs_max_per_seq = 512
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = F32
    params.flash_attn, params.swa_full = 0, False
    params.ctx_other = other
    context = llama.llama_init_from_model(model, params)
    assert context, "llama.cpp makes no context"
    return int(context)


def decode(llama: ctypes.CDLL, context: int, inputs: list[int] | np.ndarray, first: int = 0) -> None:
    """Tokens, or vectors float32 [n, D], of the positions from `first`."""
    count, one = len(inputs), (i32 * 1)(0)
    vectors = np.ascontiguousarray(inputs, dtype=np.float32)
    given = (i32 * count)(*inputs) if isinstance(inputs, list) else None
    arrays = (
        (i32 * count)(*range(first, first + count)), (i32 * count)(*[1] * count),
        (pointer * count)(*[ctypes.addressof(one)] * count), (ctypes.c_int8 * count)(*[given is not None] * count),
    )  # fmt: skip
    tokens, floats = (ctypes.addressof(given), None) if given is not None else (None, vectors.ctypes.data)
    assert llama.llama_decode(context, Batch(count, tokens, floats, *map(ctypes.addressof, arrays))) == 0


def logits_of(llama: ctypes.CDLL, context: int, count: int, vocabulary: int) -> np.ndarray:
    """Of the tokens decoded last, float32 [count, vocabulary]."""
    return np.ctypeslib.as_array(llama.llama_get_logits(context), (count, vocabulary)).copy()


def drafts_of(
    llama: ctypes.CDLL, files: tuple[Path, Path], ids: list[int], hidden: np.ndarray, config: Config
) -> tuple[np.ndarray, np.ndarray]:
    """What llama.cpp has for the stages before the last token, [n - 1, targets * D], and a draft's logits [B, V].

    The draft is made after the last token and from `hidden`: errors of the model are not counted twice.
    """
    assert config.dspark is not None
    main = context_of(llama, files[0])
    stages = context_of(llama, files[1], main)
    layers = gguf.GGUFReader(files[1]).fields["dflash.target_layers"].contents()
    for layer in layers:
        getattr(llama, KEEP_LAYER_INPUT)(main, layer, True)
    count = len(ids) - 1
    decode(llama, main, ids[:-1])
    inputs = [
        np.ctypeslib.as_array(getattr(llama, LAYER_INPUT)(main, layer), (count, config.hidden_size)) for layer in layers
    ]
    read = np.concatenate(inputs, axis=1)
    llama.llama_set_causal_attn(stages, False)
    decode(llama, stages, hidden)
    decode(llama, stages, [ids[-1], *[config.dspark.noise_token_id] * (config.dspark.block_size - 1)], count)
    return read, logits_of(llama, stages, config.dspark.block_size, config.vocab_size)


def as_float32(files: list[Path], target: Path, architecture: str = "deepseek4") -> Path:
    """The same keys and values in one file of float32, by the library gguf alone."""
    writer = gguf.GGUFWriter(target, architecture)
    for number, path in enumerate(files):
        reader = gguf.GGUFReader(path)
        for key, field in reader.fields.items():
            if number == 0 and not key.startswith(("GGUF.", "split.", "dsv4.", "general.architecture")):
                inner = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
        for tensor in reader.tensors:
            exact = tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.I32)
            writer.add_tensor(
                tensor.name, tensor.data if exact else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def fetched(folder: Path) -> Path | None:
    """The folder of the prebuilt libraries; None, with a line, if npm or the package cannot be had."""
    npm = shutil.which("npm")
    pack = [npm or "npm", "pack", "--silent", PACKAGE]
    if npm is None or subprocess.run(pack, cwd=folder, capture_output=True, timeout=300).returncode:
        print(f"skipped: {PACKAGE} cannot be had from npm here")
        return None
    (archive,) = folder.glob("*.tgz")
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / "package" / "bins" / "linux-x64"


def compare_logits(llama: ctypes.CDLL, folder: Path) -> None:
    """Of every position of a text, by a model of plain V4."""
    source = make_checkpoint(folder / "source", seed=3)
    convert(source, folder / "out", to="gguf", max_shard_size="4MB")
    files = sorted((folder / "out").glob("model-*.gguf"))
    exact = as_float32(files, folder / "float32.gguf")
    model = load(source, simulation=False)
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(2))
    logits = model.forward(ids, model.new_cache(1)).logits
    assert logits is not None
    ours = logits[0].numpy()
    for file, bound, what in ((exact, FLOAT32_ERROR, np.max), (files[0], EIGHT_BIT_ERROR, np.median)):
        context = context_of(llama, file)
        decode(llama, context, ids[0].tolist())
        theirs = logits_of(llama, context, TOKENS, ours.shape[1])
        error = float(what(np.abs(ours - theirs).max(axis=1)) / np.abs(ours).max())
        agree = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
        print(f"llama.cpp on {file.name}: {what.__name__} error {error:.1e} of the largest logit, top-1 {agree:.1%}")
        assert error < bound, f"{error} is more than {bound}"


def compare_drafts(llama: ctypes.CDLL, folder: Path) -> None:
    """Of DSpark's stages: what they read of the main model, and the logits of a draft."""
    source = make_checkpoint(folder / "dspark", seed=4, geometry=Geometry(compress_ratios=RATIOS, dspark=DSpark()))
    convert(source, folder / "drafts", to="gguf", max_shard_size="9GB")
    exact = (folder / "drafts" / "model.gguf", folder / "drafts" / "dspark-model.gguf")
    plain = (
        as_float32([exact[0]], folder / "model32.gguf"),
        as_float32([exact[1]], folder / "dspark32.gguf", "dflash"),
    )
    model = load(source, simulation=False)
    ids = torch.randint(0, model.config.vocab_size, (DRAFT_AFTER + 1,), generator=torch.Generator().manual_seed(5))
    hidden = model.forward(ids[None, :-1], model.new_cache(1)).hidden[0].numpy()
    drafts = teacher_forced(model, ids.tolist()).drafts
    assert drafts is not None
    ours = drafts.logits[DRAFT_AFTER - 1].numpy()
    for files, bound, what in ((plain, FLOAT32_ERROR, np.max), (exact, EIGHT_BIT_ERROR, np.median)):
        read, theirs = drafts_of(llama, files, ids.tolist(), hidden, model.config)
        errors = [float(what(np.abs(a - b).max(axis=1)) / np.abs(a).max()) for a, b in ((hidden, read), (ours, theirs))]
        print(f"llama.cpp on {files[1].name}: {what.__name__} error of a draft's logits {errors[1]:.1e} of the largest,"
              f" of what the stages read {errors[0]:.1e}")  # fmt: skip
        assert max(errors) < bound, f"{errors} are more than {bound}"


def main(folder: Path) -> None:
    """Convert, compute twice, compare."""
    libraries = fetched(folder)
    if libraries is not None:
        llama = library(libraries)
        compare_logits(llama, folder)
        compare_drafts(llama, folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(place))
