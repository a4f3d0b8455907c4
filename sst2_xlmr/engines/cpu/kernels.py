"""Compile `kernels.c` and `int8.c` for this machine, once, and call them on tensors.

The library has a plain C interface and needs no torch headers, so compiling takes a second or two. It uses the OpenMP
runtime that torch has loaded, and with it torch's threads.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sst2_xlmr.util import downloads
from sst2_xlmr.util.files import digest_of, sync_files

HERE = Path(__file__).parent
SOURCES, HEADER = [HERE / "kernels.c", HERE / "int8.c"], HERE / "real.h"
FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fopenmp", "-shared", "-fPIC"]
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


def struct(**fields: str) -> np.dtype:
    """Return NumPy's description of a C struct: its fields' names, in order, and NumPy's codes of their types."""
    return np.dtype(list(fields.items()), align=True)


_DROPOUT = struct(keys="u8", site="u4", threshold="u4", scale="f4")
_ATTENTION = struct(
    **dict.fromkeys(("q", "k", "v", "starts"), "u8"),
    **dict.fromkeys(("q_stride", "kv_stride"), "i8"),
    **dict.fromkeys(("texts", "heads", "size", "longest", "first_only"), "i4"),
)
# One parameter for AdamW, and where it finds gradients: those of several processes lie `stride` bytes apart.
PARAMETER = struct(**dict.fromkeys(("grad", "weights", "low", "mean", "square"), "u8"), n="i8", rate="f4", decay="f4")
GRADIENTS = struct(stride="i8", processes="i4", is_fp32="i4")

_SIGNATURES = {
    "dropout": (_P, _L, _I, _P, _I),
    "column_sums": (_P, _L, _I, _P, _I),
    "add_norm": (_P, _P, _P, _P, _P, ctypes.c_float, _P, _P, _L, _I, _P, _I),
    "add_norm_backward": (_P, _P, _P, ctypes.c_float, _P, _P, _P, _P, _P, _L, _I, _P, _I),
    "bias_gelu": (_P, _P, _P, _L, _I, _I),
    "bias_gelu_backward": (_P, _P, _P, _L, _I, _I),
    "attention": (_P, _P, _P, _I),
    "attention_backward": (_P, _P, _P, _P, _P, _P, _I),
    "square_sum": (_P, _I, _P, _I),
    "adamw": (_P, _I, _P, *[ctypes.c_float] * 5, _I),
}
_INT8_SIGNATURES = {  # with AVX512-VNNI only
    "quantize": (_P, _L, _I, _P, _P, _I),
    "int8_linear": (_P, _P, _P, _L, _P, _P, _P, _P, _I),
    "int16_linear": (_P, _P, _P, _L, _P, _I),
}


@dataclass(frozen=True)
class Packed:
    """The tokens of some texts one after another; matrices may have more rows, which belong to no text."""

    starts: Tensor  # int32 [texts + 1], text b has tokens starts[b]:starts[b + 1]
    keys: Tensor  # uint32 [rows], what dropout masks are drawn from, as int32
    longest: int  # tokens of the longest text
    drop_p: float  # the probability of dropout

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])


def mix(values: np.ndarray) -> np.ndarray:
    """murmur3's finalizer on uint32 values, as `mix` in the C source: a cheap random permutation."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def _dropout(rows: Packed, site: int, at: Tensor | None = None) -> np.ndarray:
    keys = rows.keys if at is None else at
    return np.array((keys.data_ptr(), site, int(rows.drop_p * 2**32), 1 / (1 - rows.drop_p)), _DROPOUT)


class Kernels:
    """The functions of `kernels.c` for one dtype, on contiguous tensors of it.

    A kernel does several operations in one pass over memory; that is why some take many arguments.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.library, self.dtype = library, dtype
        self.has_int8 = hasattr(library, "int8_linear")
        for name, arguments in {**_SIGNATURES, **(_INT8_SIGNATURES if self.has_int8 else {})}.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_double if name == "square_sum" else None

    def __reduce__(self) -> tuple[Any, ...]:  # so that a model with kernels can be copied and saved
        return load_kernels, (self.dtype,)

    def dropout_(self, values: Tensor, rows: Packed, site: int, at: Tensor | None = None) -> None:
        """Multiply [rows, n] by the masks of a site, in place; `at` has the rows' keys if they are not all tokens."""
        drop = _dropout(rows, site, at)
        self.library.dropout(values.data_ptr(), *values.shape, drop.ctypes.data, torch.get_num_threads())

    def column_sums(self, values: Tensor) -> Tensor:
        result = values.new_empty(values.shape[1])
        self.library.column_sums(values.data_ptr(), *values.shape, result.data_ptr(), torch.get_num_threads())
        return result

    def add_norm(
        self,
        x: Tensor,
        y: Tensor | None,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        epsilon: float,
        rows: Packed,
        site: int,
        at: Tensor | None = None,
        with_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return hidden = x + dropout(y + bias), or x without y, and its LayerNorm; all [rows, n].

        Without `with_grad`, both are the LayerNorm: only the backward pass needs `hidden`.
        """
        normed = torch.empty_like(x)
        hidden = torch.empty_like(x) if with_grad else normed
        tensors = [None if t is None else t.data_ptr() for t in (x, y, bias, gamma, beta)]
        outputs = (hidden.data_ptr(), normed.data_ptr())
        drop = _dropout(rows, site, at)
        self.library.add_norm(*tensors, epsilon, *outputs, *x.shape, drop.ctypes.data, torch.get_num_threads())
        return hidden, normed

    def add_norm_backward(
        self,
        grad: Tensor,
        hidden: Tensor,
        gamma: Tensor,
        epsilon: float,
        rows: Packed,
        site: int,
        at: Tensor | None = None,
        has_y: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of hidden (and x), y, gamma, beta, bias."""
        dhidden, dy = torch.empty_like(grad), torch.empty_like(grad)
        dgamma, dbeta, dbias = (torch.empty_like(gamma) for _ in range(3))
        written = (dhidden, dy if has_y else None, dgamma, dbeta, dbias if has_y else None)
        outputs = [None if t is None else t.data_ptr() for t in written]
        inputs = (grad.data_ptr(), hidden.data_ptr(), gamma.data_ptr())
        drop = _dropout(rows, site, at)
        sizes = *grad.shape, drop.ctypes.data, torch.get_num_threads()
        self.library.add_norm_backward(*inputs, epsilon, *outputs, *sizes)
        return dhidden, dy, dgamma, dbeta, dbias

    def bias_gelu_(self, x: Tensor, bias: Tensor, with_grad: bool = False) -> Tensor:
        """Return gelu(x + bias); x becomes it, too, or `with_grad` the derivative there."""
        y = torch.empty_like(x) if with_grad else None
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (x, bias, y)]
        self.library.bias_gelu(*pointers, *x.shape, torch.get_num_threads())
        return x if y is None else y

    def bias_gelu_backward_(self, grad: Tensor, derivative: Tensor) -> Tensor:
        """Multiply `grad` by the derivative, in place, and return the bias's gradient."""
        bias = grad.new_empty(grad.shape[1])
        tensors = (grad.data_ptr(), derivative.data_ptr(), bias.data_ptr())
        self.library.bias_gelu_backward(*tensors, *grad.shape, torch.get_num_threads())
        return bias

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, rows: Packed, site: int) -> Tensor:
        """Return [queries, hidden]; q, k, v are [tokens, hidden], possibly columns of a wider matrix.

        A `q` with one row per text is the query of the text's first token. Rows behind the last text become zero.
        """
        mixed = q.new_empty(q.shape)
        mixed[rows.tokens :] = 0
        attention, drop = _attention(q, k, v, heads, rows), _dropout(rows, site)
        self.library.attention(attention.ctypes.data, mixed.data_ptr(), drop.ctypes.data, torch.get_num_threads())
        return mixed

    def attention_backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        outputs: tuple[Tensor, Tensor, Tensor],
        heads: int,
        rows: Packed,
        site: int,
    ) -> None:
        """Write the gradients of `inputs` (q, k, v) into `outputs`, which are laid out as these are."""
        for output in outputs:
            output[rows.tokens :] = 0
        q, k, v = inputs
        attention, drop = _attention(q, k, v, heads, rows), _dropout(rows, site)
        pointers = [output.data_ptr() for output in outputs]
        threads = torch.get_num_threads()
        self.library.attention_backward(attention.ctypes.data, grad.data_ptr(), *pointers, drop.ctypes.data, threads)

    def square_sum(self, parameters: np.ndarray, gradients: np.ndarray) -> float:
        """Return the sum of squares of all gradients; the arrays are of PARAMETER and (no dimensions) of GRADIENTS."""
        sizes = (parameters.ctypes.data, len(parameters), gradients.ctypes.data)
        return float(self.library.square_sum(*sizes, torch.get_num_threads()))

    def adamw(self, parameters: np.ndarray, gradients: np.ndarray, *scalars: float) -> None:
        """Make one step of AdamW; for the scalars, from `scale` to `root`, see the C source."""
        sizes = (parameters.ctypes.data, len(parameters), gradients.ctypes.data)
        self.library.adamw(*sizes, *scalars, torch.get_num_threads())


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, rows: Packed) -> np.ndarray:
    texts = len(rows.starts) - 1
    pointers = [tensor.data_ptr() for tensor in (q, k, v, rows.starts)]
    sizes = (texts, heads, q.shape[1] // heads, rows.longest, len(q) != len(k) or len(k) == texts)
    return np.array((*pointers, q.stride(0), k.stride(0), *sizes), _ATTENTION)


def load_kernels(dtype: torch.dtype) -> Kernels | None:
    """Return the kernels for bf16 or fp32, compiled at the first call on a machine; None: see `fallback_reason`."""
    found = _find_kernels(dtype)
    return found if isinstance(found, Kernels) else None


def fallback_reason() -> str:
    """Return why there are no kernels here, in a few words; "" if there are."""
    found = [_find_kernels(dtype) for dtype in (torch.float32, torch.bfloat16)]
    return next((reason for reason in found if isinstance(reason, str)), "")


@functools.lru_cache
def _find_kernels(dtype: torch.dtype) -> Kernels | str:
    """Return the kernels, or why there are none."""
    if platform.system() != "Linux":
        return f"kernels are for Linux, not {platform.system()}"
    compiler = shlex.split(os.environ.get("CC") or "") or [name for name in ("gcc", "cc") if shutil.which(name)][:1]
    if not compiler or not shutil.which(compiler[0]):
        return f"no C compiler: {compiler[0] if compiler else 'gcc'} not found"
    command = [*compiler, *FLAGS, *(["-DBF16"] if dtype == torch.bfloat16 else [])]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            library = _compiled(command, Path(scratch))
            try:
                return Kernels(_load(library, Path(scratch)), dtype)  # once loaded, the file may go
            except OSError as error:
                return f"cannot load what {compiler[0]} compiled: {error}"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines() or [f"exit status {error.returncode}"]
        return f"{compiler[0]} failed: {next((line for line in lines if 'error' in line), lines[0]).strip()}"
    except OSError as error:
        return f"cannot compile: {error}"


def _compiled(command: list[str], scratch: Path) -> Path:
    """Return the library, compiled into the cache unless it is there; into `scratch` if the cache cannot be used."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0] if cpuinfo.is_file() else ""
    features = [line for line in processor.splitlines() if line.startswith(("flags", "Features"))]
    recipe = repr(([file.read_bytes() for file in (*SOURCES, HEADER)], command, platform.machine(), features))
    name = hashlib.sha256(recipe.encode()).hexdigest()[:32]
    cache = downloads.cache_dir() / f"kernels-{os.getuid()}"
    if downloads.ensure_private(cache):  # others must not be able to change what this process loads
        with contextlib.suppress(OSError):
            made = [file for file in cache.glob(f"{name}-*.so") if file.stem == f"{name}-{digest_of(file)[:16]}"]
            return made[0] if made else _compile(command, cache, name)
    return _compile(command, scratch, name)


def _load(library: Path, scratch: Path) -> ctypes.CDLL:
    """Load the library from where it is, or from `scratch` if the cache is on a disk mounted noexec."""
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(library))
    return ctypes.CDLL(str(shutil.copy(library, scratch / "kernels.so")))


def _compile(command: list[str], folder: Path, name: str) -> Path:
    """Compile into `folder`; the name has the file's own digest, so that a damaged one is not loaded."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch, "kernels.so")
        subprocess.run([*command, "-o", str(made), *map(str, SOURCES), "-lm"], check=True, capture_output=True)
        sync_files(Path(scratch))  # cut short by a power failure, it would be compiled again
        return made.rename(folder / f"{name}-{digest_of(made)[:16]}.so")
