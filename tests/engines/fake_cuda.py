"""Compile the optimizer's update for GPUs that are not there; prints a JSON object, precision -> what came out.

Inductor generates Triton code from fake tensors, and Triton makes machine code from it, with ptxas, which needs no GPU.
Written for the internals of torch 2.3 and Triton 2.3; run by test_cuda_update.py in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable
from unittest import mock

import torch
import torch._inductor.scheduler
import torch._inductor.triton_heuristics
import triton
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.compiler.backends.cuda import CUDABackend

from sst2_xlmr.training.flat_engine import update_flat

H100 = SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2048, warp_size=32, name="H100"
)


class Update(torch.nn.Module):
    """The update on copies, which are returned: that is how functions without side effects are exported."""

    def forward(self, gradient: torch.Tensor, scalars: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        exp_avg, exp_avg_sq, working, *low = copies = [tensor.clone() for tensor in state]
        update_flat(gradient, exp_avg, exp_avg_sq, working, low[0] if low else None, scalars)
        return tuple(copies)


def generate(bf16: bool) -> str:
    """Return Inductor's program for an H100."""
    with FakeTensorMode() as mode:

        def empty(dtype: torch.dtype, n: int = 100_000) -> torch.Tensor:
            return torch.empty(n, dtype=dtype, device="cuda:0")

        weights = torch.bfloat16 if bf16 else torch.float32
        state = [empty(torch.float32), empty(torch.float32), empty(weights), *([empty(torch.int16)] if bf16 else [])]
        inputs = [empty(weights), empty(torch.float32, 4), *state]
    program, _ = aot_export_module(Update(), inputs, trace_joint=False, decompositions=select_decomp_table())
    graph = GraphLowering(program)
    with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        graph.run(*inputs)
        return graph.codegen()[0]


def machine_code(source: str, capability: int, scratch: Path) -> int:
    """Return the size in bytes of a kernel's machine code, compiled from its Triton source."""
    (scratch / "kernel.py").write_text(source, encoding="utf-8")
    heuristics: dict[str, Any] = {}

    def remember(**arguments: Any) -> Callable[[Any], Any]:
        heuristics.update(arguments)
        return lambda function: function

    with mock.patch.object(torch._inductor.triton_heuristics, "pointwise", remember):
        spec = importlib.util.spec_from_file_location("kernel", scratch / "kernel.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    meta = heuristics["triton_meta"]
    constants = {module.triton_.arg_names.index("XBLOCK"): 1024}
    ast = triton.compiler.ASTSource(module.triton_, meta["signature"], constants, meta["configs"][0])
    launcher = scratch / "launcher.py"
    launcher.write_text("launch = None")
    with (
        mock.patch.object(CUDABackend, "make_launcher_stub", return_value=str(launcher)),  # its own links to the driver
        mock.patch.object(triton.compiler.compiler, "driver", SimpleNamespace(binary_ext="cubin")),
    ):
        return len(triton.compile(ast, target=("cuda", capability)).asm["cubin"])


def main(scratch: Path) -> None:
    results: dict[str, Any] = {}
    with (
        mock.patch.object(torch._inductor.scheduler, "has_triton", return_value=True),
        mock.patch.object(torch.Tensor, "copy_", lambda target, source: target.mul_(0).add_(source)),  # asks the driver
        mock.patch.multiple(
            torch.cuda,
            _lazy_init=lambda: None,
            current_device=lambda: 0,
            get_device_properties=lambda *_: H100,
            get_device_capability=lambda *_: (9, 0),
        ),
    ):
        for precision in ("fp32", "bf16"):
            program = generate(precision == "bf16")
            kernels = re.findall(r"async_compile\.triton\('triton_', '''\n(.*?)'''", program, re.DOTALL)
            capabilities = (80, 90) if precision == "bf16" else (70, 75, 80, 90)
            sizes = {str(each): [machine_code(kernel, each, scratch) for kernel in kernels] for each in capabilities}
            results[precision] = {"kernels": len(kernels), "machine_code": sizes}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
