"""One measured process of bench.py, which starts it: its peak memory is then that of its task alone.

    worker.py train|eval|weights SPEC

prints `{"ready": true}` once everything is built and warm, then answers every line of standard input, a JSON object,
with one on standard output, until the input ends. Started by torchrun, its processes train together, and rank 0 speaks.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch

from sst2_xlmr import distributed
from sst2_xlmr.accelerate import accelerate
from sst2_xlmr.config import Config
from sst2_xlmr.data.batches import BatchLoader
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.distributed import World
from sst2_xlmr.engines.cpu.packed_encoder import rounded_up
from sst2_xlmr.errors import exit_on_user_error
from sst2_xlmr.evaluation.evaluate import evaluate
from sst2_xlmr.export.hugging_face import Description, export_hugging_face
from sst2_xlmr.memory import keep_freed_memory
from sst2_xlmr.model.classifier import Classifier
from sst2_xlmr.model.compact_vocab import renumbering
from sst2_xlmr.model.encoders import EncoderShape
from sst2_xlmr.training.averaging import connect
from sst2_xlmr.training.loss import make_loss
from sst2_xlmr.training.optimizer import AdamW, Groups
from sst2_xlmr.training.step import forward_backward

Answer = dict[str, Any]


class Spec(NamedTuple):
    """What bench.py writes for its processes.

    Attributes:
        config: batch sizes, precision, device, threads, compilation, seed.
        shape: the encoder's, with the whole vocabulary.
        kept_ids: int64 [rows], the embedding rows to build.
        caches: the rows to warm up with, to train on, and to evaluate on ("warmup", "train", "dev").
        encoder_folder, tokenizer_file: where task "weights" writes, and what it copies there.
    """

    config: Config
    shape: EncoderShape
    kept_ids: np.ndarray
    caches: dict[str, TokenCache]
    encoder_folder: Path
    tokenizer_file: Path


def read_spec(file: Path) -> Spec:
    settings = json.loads(file.read_text(encoding="utf-8"))
    config, shape = Config(**settings["config"]), EncoderShape(**settings["shape"])
    with np.load(settings["rows_file"]) as arrays:
        kept_ids = arrays["kept_ids"]
        renumbered = renumbering(kept_ids, shape.vocab_size) if not config.full_vocabulary else None
        caches = {
            split: TokenCache(*(arrays[f"{split}_{part}"] for part in ("ids", "offsets", "labels")))
            for split in ("warmup", "train", "dev")
        }
    for cache in caches.values():
        cache.renumbering = renumbered
    return Spec(config, shape, kept_ids, caches, Path(settings["encoder_folder"]), Path(settings["tokenizer_file"]))


def model_flops(shape: EncoderShape, lengths: np.ndarray, num_labels: int, training: bool) -> int:
    """Return the floating-point operations that rows of these lengths need, 2 m n k for a product [m, k] x [k, n].

    Only matrix products count, and only what the result depends on: no padding; in the last layer keys and values of
    all tokens, but queries, output projection and feed-forward part of `<s>` alone, which is all that reaches the head.
    A backward pass needs two products of the same size for each one forward. Recomputed, masked or padded work counts
    for nothing, so a wasteful implementation cannot look busy.

    Args:
        lengths: int [rows], tokens per row, `<s>` and `</s>` included.
        training: count the backward pass too.
    """
    hidden, ffn = shape.hidden, shape.ffn
    rows, tokens, pairs = len(lengths), int(lengths.sum()), int((lengths.astype(np.int64) ** 2).sum())
    square, feed_forward = 2 * hidden * hidden, 2 * 2 * hidden * ffn  # per token; two matrices feed forward
    # Queries, keys, values and output are a square each; scores and mixture are two products over all pairs of tokens.
    whole_layer = tokens * (4 * square + feed_forward) + pairs * 2 * 2 * hidden
    last_layer = tokens * 2 * square + rows * (2 * square + feed_forward) + tokens * 2 * 2 * hidden
    head = rows * (square + 2 * hidden * num_labels)
    forward = (shape.layers - 1) * whole_layer + last_layer + head
    return forward * (3 if training else 1)


def clock(device: torch.device) -> float:
    """Return the time in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> Answer:
    """Return what this process has had in memory at most.

    Not `ru_maxrss`, where the kernel tells: that begins with the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))):
        peak = {"peak_rss_bytes": int(found[1]) * 1024}
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def rates(spec: Spec, split: str, seconds: float, training: bool) -> Answer:
    """Return what having gone through all rows of a split once, in so many seconds, comes to."""
    lengths = spec.caches[split].lengths()
    flops = model_flops(spec.shape, lengths, len(spec.config.classes), training)
    return {
        "samples_per_s": len(lengths) / seconds,
        "tokens_per_s": int(lengths.sum()) / seconds,
        "model_gflop_per_s": flops / seconds / 1e9,
    }


def random_classifier(spec: Spec, rows: int) -> Classifier:
    """Build the model with random weights and an embedding table of so many rows."""
    torch.manual_seed(spec.config.seed)
    shape = dataclasses.replace(spec.shape, vocab_size=rows)
    return Classifier(shape, len(spec.config.classes), spec.config.dropout, spec.config.head_dropout)


def prepare_training(spec: Spec, world: World) -> Callable[..., Answer]:
    """Build what train.py builds, and warm up; the result trains for one epoch of the sampled rows when called."""
    config = spec.config
    classifier = random_classifier(spec, len(spec.kept_ids)).to(world.device)
    groups = Groups(spec.shape.layers, config.weight_decay, config.layerwise_lr_decay)
    optimizer = AdamW(classifier, groups, config.max_grad_norm, bf16=config.precision == "bf16")
    computation = accelerate(classifier, world, optimizer, config.compile)
    model = connect(computation, optimizer, world)
    loaders = {split: BatchLoader(spec.caches[split], config, world) for split in ("warmup", "train")}
    loss = make_loss(config, spec.caches["train"].labels, world.device)
    model.train()

    def run_epoch(split: str, epoch: int, mark: Callable[[str], None]) -> tuple[float, float]:
        """Return seconds, and the share of what the model computed that was padding."""
        loader = loaders[split]
        computed = real = 0
        start = clock(world.device)
        for rank_batch in itertools.islice(loader.starting_at(epoch, 0), len(loader)):
            mark("data")
            forward_backward(model, rank_batch, loss, optimizer, world)
            mark("backward")
            norm = optimizer.gradient_norm()
            mark("clip")
            optimizer.step(config.lr, norm)
            mark("step")
            for batch in rank_batch.micro_batches:
                real += batch.real_tokens
                computed += batch.tokens.numel() if computation.model is classifier else rounded_up(batch.real_tokens)
        return clock(world.device) - start, 1 - real / computed

    def measure(epoch: int, phases: bool) -> Answer:
        seconds, padding_share = run_epoch("train", epoch, lambda phase: None)
        answer = rates(spec, "train", seconds, training=True)
        answer.update(
            padding_share=padding_share,
            compiled=computation.is_compiled,
            **peak_memory(world.device),
        )
        if phases:
            answer["ms_per_step"] = phases_of_a_step(epoch)
        return answer

    def phases_of_a_step(epoch: int) -> dict[str, float]:
        """Go through the rows once more, looking at the clock after every phase; returns milliseconds."""
        spent: dict[str, float] = defaultdict(float)
        last = clock(world.device)

        def mark(phase: str) -> None:
            nonlocal last
            now = clock(world.device)
            spent[phase] += now - last
            last = now

        hook = computation.model.register_forward_hook(lambda *_: mark("forward"))
        run_epoch("train", epoch, mark)
        hook.remove()
        steps = len(loaders["train"])
        return {
            phase: round(spent[phase] / steps * 1e3, 3) for phase in ("data", "forward", "backward", "clip", "step")
        }

    run_epoch("warmup", 0, lambda phase: None)
    return measure


def prepare_evaluation(spec: Spec, world: World) -> Callable[..., Answer]:
    """Build the model as it is evaluated during training, and warm up; the result evaluates on dev when called."""
    dtype = torch.bfloat16 if spec.config.precision == "bf16" else torch.float32
    classifier = random_classifier(spec, len(spec.kept_ids)).to(world.device, dtype)
    model = accelerate(classifier, world, compiles=spec.config.compile).model
    batch_tokens = spec.config.eval_batch_tokens

    def measure(epoch: int, phases: bool) -> Answer:
        start = clock(world.device)
        evaluate(model, spec.caches["dev"], batch_tokens, world)
        seconds = clock(world.device) - start
        return {**rates(spec, "dev", seconds, training=False), **peak_memory(world.device)}

    evaluate(model, spec.caches["warmup"], batch_tokens, world)
    return measure


def write_weights(spec: Spec, world: World) -> Callable[..., Answer]:
    """Write an encoder's folder with random weights and the whole vocabulary, for train.py to start from."""
    masters = dict(random_classifier(spec, spec.shape.vocab_size).named_parameters())
    names, length = spec.config.classes, spec.config.max_length
    export_hugging_face(spec.encoder_folder, masters, Description(spec.shape, names, length, spec.tokenizer_file))
    return lambda epoch, phases: {}


TASKS = {"train": prepare_training, "eval": prepare_evaluation, "weights": write_weights}


def main() -> None:
    task, file = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else a library prints is no answer
    keep_freed_memory()
    spec = read_spec(Path(file))
    with distributed.start(spec.config.device, spec.config.threads, spec.config.timeout_minutes) as world:
        measure = TASKS[task](spec, world)
        answer: Answer = {"ready": True}
        while True:
            if world.is_main:
                print(json.dumps(answer), file=answers, flush=True)
            order = distributed.from_main(world, sys.stdin.readline() if world.is_main else None)
            if not order:
                break
            answer = measure(**json.loads(order))


if __name__ == "__main__":
    exit_on_user_error(main)
