"""llama.cpp as a row of run.py: the prebuilt library of npm on the GGUF file that `convert --to gguf` writes.

The library is fetched, and its structs are declared, by .ci/llama_cpp.py, which compares its logits with those of dsv4.
Here it runs as its users run it: keys in float16, flash attention where it chooses so, weights repacked.
"""

import ctypes
import runpy
from pathlib import Path
from typing import Any

CI = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "llama_cpp.py"))
CONTEXT, BATCH = 2048, 512


def libraries(folder: Path) -> Path | None:
    """The folder of the libraries in `folder`, fetched if they are not there; None, with a line, where npm has none."""
    found = folder / "package" / "bins" / "linux-x64"
    if found.exists():
        return found
    folder.mkdir(exist_ok=True)
    fetched: Path | None = CI["fetched"](folder)
    return fetched


class LlamaCpp:
    """One model and one sequence."""

    def __init__(self, folder: Path, files: Path, threads: int) -> None:
        self._llama = llama = CI["library"](folder)
        llama.llama_get_memory.restype, llama.llama_get_memory.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        llama.llama_memory_clear.restype, llama.llama_memory_clear.argtypes = None, [ctypes.c_void_p, ctypes.c_bool]
        llama.llama_synchronize.restype, llama.llama_synchronize.argtypes = None, [ctypes.c_void_p]
        first = min(files.glob("model-*.gguf"))
        model = llama.llama_model_load_from_file(str(first).encode(), llama.llama_model_default_params())
        assert model, f"llama.cpp does not load {first.name}"
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(model, params)
        assert self._context, "llama.cpp makes no context"
        self._position = 0

    def prefill(self, ids: Any) -> None:
        """An empty context and the whole prompt."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._position = 0
        self.step(ids)

    def step(self, ids: Any) -> None:
        """More tokens, at most BATCH; logits of the last one."""
        tokens, i32 = ids[0].tolist(), ctypes.c_int32
        count, zero = len(tokens), i32(0)
        arrays = (
            (i32 * count)(*tokens), (i32 * count)(*range(self._position, self._position + count)),
            (i32 * count)(*[1] * count), (ctypes.c_void_p * count)(*[ctypes.addressof(zero)] * count),
            (ctypes.c_int8 * count)(*[0] * (count - 1), 1),
        )  # fmt: skip
        token, position, sequences, sequence, wanted = map(ctypes.addressof, arrays)
        batch = CI["Batch"](count, token, None, position, sequences, sequence, wanted)
        assert self._llama.llama_decode(self._context, batch) == 0, "llama_decode fails"
        self._llama.llama_synchronize(self._context)
        self._position += count
