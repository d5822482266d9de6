"""Which option may be meant by a name that is none: names of other tools, last parts of names, spelling."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# what other tools call an option -> what it is called here: the first is meant where several exist in a script
SYNONYMS: dict[str, tuple[str, ...]] = {
    "lr": ("optimizer.learning_rate",),
    "learning_rate": ("optimizer.learning_rate",),
    "lr_scheduler": ("optimizer.schedule",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "scheduler": ("optimizer.schedule",),
    "warmup": ("optimizer.warmup_fraction",),
    "warmup_ratio": ("optimizer.warmup_fraction",),
    "weight_decay": ("optimizer.weight_decay",),
    "grad_clip": ("optimizer.max_grad_norm",),
    "optim": ("optimizer.name",),
    "batch_size": ("global_batch", "batch_sequences", "scoring.batch_tokens"),
    "train_batch_size": ("global_batch",),
    "per_device_train_batch_size": ("micro_batch",),
    "micro_batch_size": ("micro_batch",),
    "gradient_accumulation_steps": ("micro_batch", "global_batch"),
    "max_steps": ("steps",),
    "num_steps": ("steps",),
    "num_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "epoch": ("epochs",),
    "max_length": ("window",),
    "max_len": ("window",),
    "max_seq_length": ("window",),
    "max_seq_len": ("window",),
    "seq_len": ("window",),
    "seq_length": ("window",),
    "sequence_length": ("window",),
    "block_size": ("window",),
    "context_length": ("window",),
    "temperature": ("loss.kd.temperature", "temperatures"),
    "tau": ("loss.kd.temperature",),
    "kd_weight": ("loss.kd.weight",),
    "lambda": ("loss.kd.weight",),
    "lambda_kd": ("loss.kd.weight",),
    "alpha": ("loss.kd.weight", "student.adapter.alpha"),
    "lm_weight": ("loss.lm.weight",),
    "beta": ("loss.kd.beta",),
    "divergence": ("loss.kd.divergence",),
    "top_k": ("k",),
    "topk": ("k",),
    "seeds": ("seed", "seeds"),
    "model": ("student.path", "teacher.path", "model.path"),
    "model_name_or_path": ("student.path", "teacher.path", "model.path"),
    "student_model": ("student.path",),
    "teacher_model": ("teacher.path",),
    "dataset": ("gold.files", "corpus.files", "text.files"),
    "data": ("gold.files", "corpus.files", "text.files"),
    "train_file": ("gold.files",),
    "validation_file": ("dev.files",),
    "test_file": ("test.files", "text.files"),
    "output_dir": ("runs_dir", "caches_dir", "out"),
    "gpus": ("launcher.num_processes", "num_workers"),
    "num_gpus": ("launcher.num_processes", "num_workers"),
    "nproc_per_node": ("launcher.num_processes",),
    "nnodes": ("launcher.num_nodes",),
    "master_addr": ("launcher.rendezvous_host",),
    "master_port": ("launcher.rendezvous_port",),
    "rdzv_endpoint": ("launcher.rendezvous_host",),
    "zero": ("deepspeed.zero_stage",),
    "bf16": ("student.dtype", "teacher.dtype", "model.dtype"),
    "fp16": ("student.dtype", "teacher.dtype", "model.dtype"),
    "precision": ("student.dtype", "teacher.dtype", "model.dtype"),
    "lora_rank": ("student.adapter.rank",),
    "lora_r": ("student.adapter.rank",),
    "lora_alpha": ("student.adapter.alpha",),
    "report_to": ("trackers",),
    "logger": ("trackers",),
    "wandb": ("trackers",),
    "eval_steps": ("evaluate_every_steps",),
    "save_steps": ("checkpoint.every_steps",),
    "patience": ("early_stopping.patience",),
    "resume_from_checkpoint": ("runs_dir",),
}


def nearest_options(key: str, known: Sequence[str]) -> list[str]:
    """Up to three options that a name may mean: by another tool's name, by the last part, by spelling."""
    last = key.rsplit(".", 1)[-1]
    by_last: dict[str, list[str]] = {}
    for name in known:
        by_last.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    near = [name for name in SYNONYMS.get(last.lower(), ()) if name in known]
    near += by_last.get(last, []) + difflib.get_close_matches(key, known, n=3)
    near += [name for close in difflib.get_close_matches(last, by_last, n=2, cutoff=0.75) for name in by_last[close]]
    return list(dict.fromkeys(near))[:3]
