"""One measured process, which bench.py starts so that its peak memory is that of its task alone.

    worker.py train|eval|int8|weights SPEC

prints `{"ready": true}` once everything is built and warm. Then every line of standard input is a JSON object and is
answered by one on standard output, until the input ends. SPEC is a spec.json (see spec.py). Under torchrun the
processes train together, and rank 0 answers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from figures import Answer
from measuring import clock, peak_memory
from sst2_xlmr.training.loss import make_loss
from torch import nn

from sst2_xlmr import engines
from sst2_xlmr.backend import accelerate
from sst2_xlmr.config import Config
from sst2_xlmr.data.batches import Batch, BatchLoader, GlobalBatchSampler, RankBatch
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.engines.cpu.packed_encoder import rounded_up
from sst2_xlmr.evaluation.evaluate import evaluate
from sst2_xlmr.export.folder import write_folder
from sst2_xlmr.model.classifier import Classifier, dropouts_of
from sst2_xlmr.model.encoders import Encoder, EncoderShape
from sst2_xlmr.model.vocabulary import renumbering
from sst2_xlmr.training.ddp import connect
from sst2_xlmr.training.optimizer import AdamW, Groups
from sst2_xlmr.training.step import forward_backward
from sst2_xlmr.util import distributed
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import UserError, exit_on_user_error
from sst2_xlmr.util.memory import keep_freed_memory


class Spec(NamedTuple):
    """What is measured.

    Attributes:
        config: train.py's options.
        shape: the encoder's sizes, with the whole vocabulary.
        kept_ids: int64 [rows], the embedding rows to build.
        caches: the rows to warm up with, to train on, and to evaluate on ("warmup", "timed", "dev").
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
            name: TokenCache(*(arrays[f"{name}_{part}"] for part in ("ids", "offsets", "labels")))
            for name in ("warmup", "timed", "dev")
        }
    for cache in caches.values():
        cache.renumbering = renumbered
    return Spec(config, shape, kept_ids, caches, Path(settings["encoder_folder"]), Path(settings["tokenizer_file"]))


def model_flops(shape: EncoderShape, lengths: np.ndarray, num_labels: int, training: bool) -> int:
    """Return the floating-point operations that rows of these lengths need, 2 m n k for a product [m, k] x [k, n].

    Only matrix products count, and only those that the result depends on: none of padding; in the last layer keys and
    values of all tokens, but queries, output projection and feed-forward part of `<s>` alone, which is all that reaches
    the head. A backward pass needs two products of the same size for each one forward. What is recomputed, masked or
    padded does not count: wasted work does not raise the utilisation.

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


def rates(spec: Spec, name: str, seconds: float, training: bool) -> Answer:
    """Return the rates of one pass over a set of rows that took `seconds`."""
    lengths = spec.caches[name].lengths()
    flops = model_flops(spec.shape, lengths, len(spec.config.classes), training)
    return {
        "samples_per_s": len(lengths) / seconds,
        "tokens_per_s": int(lengths.sum()) / seconds,
        "model_gflop_per_s": flops / seconds / 1e9,
        "tokens_per_row": float(lengths.mean()),
    }


def random_classifier(spec: Spec, rows: int) -> Classifier:
    """Build the model with random weights and an embedding table of `rows` rows."""
    torch.manual_seed(spec.config.seed)
    shape = dataclasses.replace(spec.shape, vocab_size=rows)
    config = spec.config
    return Classifier(shape, len(config.classes), dropouts_of(config))


class ConsecutiveBatches(GlobalBatchSampler):
    """Yields rows as they come, a global batch after another: bench.py has put them in an order of training."""

    def global_batches(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        rows = np.arange(len(self.lengths))
        for batch in range(first, len(self)):
            yield rows[batch * self.batch_size : (batch + 1) * self.batch_size]


def no_mark(phase: str) -> None:
    """Ignore that a phase has ended."""


class TrainingRun:
    """What train.py builds for its loop; only the first few methods depend on how the package does it."""

    def __init__(self, spec: Spec, world: World) -> None:
        self.spec, self.config, self.world = spec, spec.config, world
        self.on_cuda = world.device.type == "cuda"
        config, self.classifier = spec.config, random_classifier(spec, len(spec.kept_ids)).to(world.device)
        groups = Groups(spec.shape.layers, config.weight_decay, config.layerwise_lr_decay)
        self.optimizer = AdamW(self.classifier, groups, config.max_grad_norm, bf16=config.precision == "bf16")
        self.computation = accelerate(self.classifier, world, self.optimizer, config.compile)
        self.model = connect(self.computation, self.optimizer, world)
        self.loss = make_loss(config, spec.caches["timed"].labels, world.device)
        self.loaders = {name: self.build_loader(name) for name in ("warmup", "timed")}
        self.model.train()

    def build_loader(self, name: str) -> BatchLoader:
        """Return the loader of a set of rows."""
        cache, config = self.spec.caches[name], self.config
        sampler = ConsecutiveBatches(cache.lengths(), config.batch_size, config.seed, self.world)
        return BatchLoader(cache, sampler, config, self.world.device)

    def make_step(self, rank_batch: RankBatch, mark: Callable[[str], None]) -> None:
        """Make one optimizer step, as train.py does; `mark` is told the name of every phase when it ends."""
        forward_backward(self.model, rank_batch, self.loss, self.optimizer, self.world)
        mark("backward")
        norm = self.optimizer.gradient_norm()
        mark("clip")
        self.optimizer.step(self.config.lr, norm)
        mark("step")

    def computed_tokens(self, batch: Batch) -> int:
        """Return how many tokens the model computes for a batch, padding included."""
        packs = self.computation.model is not self.classifier
        return rounded_up(batch.real_tokens) if packs else batch.tokens.numel()

    def train(self, name: str, epoch: int, mark: Callable[[str], None] = no_mark) -> tuple[float, float]:
        """Train on a set of rows once; returns seconds, and computed tokens per real one."""
        loader = self.loaders[name]
        computed = real = 0
        start = clock(self.on_cuda)
        for rank_batch in itertools.islice(loader.starting_at(epoch, 0), len(loader)):
            mark("data")
            self.make_step(rank_batch, mark)
            for batch in rank_batch.micro_batches:
                real += batch.real_tokens
                computed += self.computed_tokens(batch)
        return clock(self.on_cuda) - start, computed / real

    def measure(self, epoch: int, phases: bool) -> Answer:
        """Train on the timed rows, once more for the phases if these are asked for; `epoch` draws the dropout."""
        seconds, computed_per_real = self.train("timed", epoch)
        figures = rates(self.spec, "timed", seconds, training=True)
        figures.update(
            computed_tokens_per_row=figures["tokens_per_row"] * computed_per_real,
            compiled=not self.computation.why_not_compiled,
            **peak_memory(self.on_cuda),
        )
        if phases:
            figures["ms_per_step"] = self.ms_per_step(epoch)
            if self.on_cuda:
                figures.update(self.gpu_figures(epoch))
        return figures

    def gpu_figures(self, epoch: int) -> Answer:
        """Return how many kernels a step launches, and how busy they keep the GPU; the profiler slows the host down."""
        steps = len(self.loaders["timed"])
        with torch.profiler.profile() as profile:
            seconds, _ = self.train("timed", epoch)
        events = profile.key_averages()
        launches = sum(event.count for event in events if re.match(r"(cuda|cu)(LaunchKernel|GraphLaunch)", event.key))
        busy_s = sum(getattr(event, "self_device_time_total", 0) for event in events) / 1e6
        return {"launches_per_step": launches / steps, "gpu_busy_share_profiled": busy_s / seconds}

    def ms_per_step(self, epoch: int) -> dict[str, float]:
        """Return milliseconds per phase of a step; looking at the clock after each slows a GPU down."""
        spent: dict[str, float] = defaultdict(float)
        last = clock(self.on_cuda)

        def mark(phase: str) -> None:
            nonlocal last
            now = clock(self.on_cuda)
            spent[phase] += now - last
            last = now

        hook = self.computation.model.register_forward_hook(lambda *_: mark("forward"))
        self.train("timed", epoch, mark)
        hook.remove()
        steps = len(self.loaders["timed"])
        return {
            phase: round(spent[phase] / steps * 1e3, 3) for phase in ("data", "forward", "backward", "clip", "step")
        }


def prepare_training(spec: Spec, world: World) -> Callable[..., Answer]:
    """Build the model and warm up; the result trains on the timed rows when called."""
    run = TrainingRun(spec, world)
    run.train("warmup", epoch=0)
    return run.measure


def prepare_evaluation(spec: Spec, world: World, int8: bool = False) -> Callable[..., Answer]:
    """Build the model as train.py evaluates it, and warm up; the result evaluates on the dev split when called."""
    dtype = torch.bfloat16 if spec.config.precision == "bf16" else torch.float32
    classifier = random_classifier(spec, len(spec.kept_ids))
    if int8:
        model = model_in_8_bits(classifier, dtype, spec, world)
    else:
        model = accelerate(classifier.to(world.device, dtype), world, compiles=spec.config.compile).model
    batch_tokens, on_cuda = spec.config.eval_batch_tokens, world.device.type == "cuda"

    def measure(epoch: int, phases: bool) -> Answer:
        start = clock(on_cuda)
        evaluate(model, spec.caches["dev"], batch_tokens, world)
        seconds = clock(on_cuda) - start
        return {**rates(spec, "dev", seconds, training=False), **peak_memory(on_cuda)}

    evaluate(model, spec.caches["warmup"], batch_tokens, world)
    return measure


def model_in_8_bits(classifier: Classifier, dtype: torch.dtype, spec: Spec, world: World) -> nn.Module:
    """Return a classifier in 8 bits that computes 1 % of the texts again in 16, as trained models do.

    With random weights the labels of nearly all texts would be nearly as probable.
    """
    if not engines.can_quantize():
        raise UserError("8-bit products need a CPU with AVX512-VNNI, Linux and GCC")
    model = engines.quantize(classifier, dtype)
    model.near_tie = 0.0
    evaluation = evaluate(model, spec.caches["dev"], spec.config.eval_batch_tokens, world, keep_probabilities=True)
    assert evaluation.probabilities is not None
    second, best = np.sort(np.log(evaluation.probabilities), axis=1)[:, -2:].T
    model.near_tie = float(np.quantile(best - second, 0.01))
    return model


def write_weights(spec: Spec, world: World) -> Callable[..., Answer]:
    """Write an encoder's folder with random weights and the whole vocabulary, for train.py to start from."""
    masters = dict(random_classifier(spec, spec.shape.vocab_size).named_parameters())
    names, length = spec.config.classes, spec.config.max_length
    described = Encoder("", spec.shape, Path(), spec.tokenizer_file, names, length)
    write_folder(spec.encoder_folder, masters, described)
    return lambda epoch, phases: {}


TASKS: dict[str, Callable[..., Callable[..., Answer]]] = {
    "train": prepare_training,
    "eval": prepare_evaluation,
    "int8": functools.partial(prepare_evaluation, int8=True),
    "weights": write_weights,
}


def main() -> None:
    task, file = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # anything a library prints must not be read as an answer
    keep_freed_memory()
    spec = read_spec(Path(file))
    with distributed.start(spec.config.device, spec.config.threads, spec.config.timeout_minutes) as world:
        measure = TASKS[task](spec, world)
        answer: Answer = {"ready": True}
        while True:
            if world.is_main:
                print(json.dumps(answer), file=answers, flush=True)
            order = distributed.broadcast(world, sys.stdin.readline() if world.is_main else None)
            if not order:
                break
            answer = measure(**json.loads(order))


if __name__ == "__main__":
    exit_on_user_error(main)
