"""Imports point one way, along the way of the data."""

from __future__ import annotations

import ast

from conftest import ROOT

ORDER = ["config", "arguments", "memory", "distributed", "shared_memory", "signals", "files"]
ORDER += [
    "run_folder",
    "sources",
    "formats",
    "data",
    "tokenizer",
    "token_cache",
    "batching",
    "weight_names",
    "encoders",
    "prepare",
    "compact_vocab",
    "cpu_kernels",
    "packed_encoder",
    "model",
    "loss",
    "optim",
    "checkpoint",
    "metrics",
    "evaluate",
    "fast_tokenizer",
    "model_card",
    "export",
    "torchscript",
    "pictures",
    "tensorboard",
    "header",
    "report",
]


def test_a_module_uses_only_those_before_it() -> None:
    modules = {file.stem: file for file in (ROOT / "sst2_xlmr").glob("*.py") if file.stem != "__init__"}
    assert sorted(modules) == sorted(ORDER)
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sst2_xlmr"):
                _, _, module = node.module.partition(".")
                for other in [module] if module else [alias.name for alias in node.names]:
                    assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"
