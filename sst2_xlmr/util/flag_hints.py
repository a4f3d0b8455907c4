"""Hints for unknown flags: names from transformers' Trainer, run_glue.py and other programs, and typos."""

import difflib
from collections.abc import Iterable

# Our flag, optionally with a value or remark -> its names elsewhere. Of several, the first that a program has wins.
_SAME = {
    "lr": "learning_rate",
    "batch_size (rows over all processes together)": "per_device_train_batch_size train_batch_size",
    "micro_batch_size (rows per forward pass; --batch-size stays the global one)": "gradient_accumulation_steps"
    " gradient_accumulation grad_accum accumulate_grad_batches",
    "eval_batch_tokens": "per_device_eval_batch_size eval_batch_size",
    "batch_tokens": "per_device_eval_batch_size eval_batch_size batch_size eval_batch_tokens",
    "max_steps": "max_iters max_train_steps",
    "epochs": "num_train_epochs num_epochs max_epochs",
    "warmup_ratio": "warmup_steps num_warmup_steps warmup_proportion warmup",
    "schedule": "lr_scheduler_type",
    "max_grad_norm": "gradient_clip_val clip_grad_norm grad_clip",
    "encoder": "model_name_or_path model_name model",
    "model": "model_name_or_path model_name encoder",
    "precision bf16": "fp16 bf16 amp mixed_precision",
    "precision tf32": "tf32",
    "precision": "dtype torch_dtype",
    "device cpu": "use_cpu no_cuda",
    "deterministic": "full_determinism",
    "timeout_minutes": "ddp_timeout",
    "max_length": "max_seq_len",
    "dev_file": "validation_file eval_data_file validation_data_file val_file valid_file",
    "text_column": "sentence1_key text_column_names",
    "text_pair_column": "sentence2_key",
    "eval_every": "eval_steps eval_strategy evaluation_strategy eval_interval",
    "early_stopping_patience": "patience",
    "save_every": "save_steps save_strategy save_interval",
    "keep_checkpoints": "save_total_limit",
    "log_every": "logging_steps logging_strategy log_interval log_every_n_steps",
    "tensorboard_dir": "logging_dir log_dir",
    "resume": "resume_from_checkpoint",
    "best_by": "metric_for_best_model",
}
# Why a flag is not needed here -> flags of other programs.
_NEEDLESS = {
    "a run trains, and evaluates on dev": "do_train do_eval",
    "`sst2-xlmr predict` does it afterwards": "do_predict",
    "no run replaces another; name a new --output-dir, or continue with --resume": "overwrite_output_dir",
    "the best model is always in best/": "load_best_model_at_end",
    "--best-by knows in which direction each metric is better": "greater_is_better",
    "torchrun sets LOCAL_RANK": "local_rank",
    "batches are slices of a memory-mapped file of token ids": "num_workers dataloader_num_workers",
}


def hint(given: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" for an unknown flag or key, or why to leave it out; else an empty string."""
    name = given.lstrip("-").replace("-", "_")
    flags = {flag.lstrip("-").replace("-", "_"): flag for flag in known}
    for ours, theirs in _SAME.items():
        flag, _, rest = ours.partition(" ")
        if flag in flags and name in theirs.split():
            return f"did you mean {f'{flags[flag]} {rest}'.strip()}?"
    for why, theirs in _NEEDLESS.items():
        if "epochs" in flags and name in theirs.split():
            return f"leave it out: {why}"
    close = difflib.get_close_matches(name, flags, 1, 0.8)
    return f"did you mean {flags[close[0]]}?" if close else ""
