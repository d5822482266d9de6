"""Every option of every stage: its default, its unit, one sentence. YAML under `conf/` holds choices only.

An option marked `result=False` changes where, when or how fast a run works, but not its result: it is not part of the
run's hash. One marked `content=True` names files, which enter the hash by their content. One marked `address=True` may
name a place in an object store (s3://bucket/prefix) instead of a local path.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from pipeline.config.options import option

Dtype = Enum("Dtype", ["auto", "float32", "bfloat16", "float16"])
Targets = Enum("Targets", ["auto", "all", "completion", "next", "choices"])
MalformedPolicy = Enum("MalformedPolicy", ["stop", "skip"])
TooLongPolicy = Enum("TooLongPolicy", ["stop", "skip", "cut_left"])
Supervise = Enum("Supervise", ["last", "all_turns"])
TextShape = Enum(
    "TextShape",
    ["auto", "text", "prompt_completion", "chat", "alpaca", "sharegpt", "preference", "multiple_choice"],
)
Kind = Enum("Kind", ["topk", "sampled", "hybrid"])
CompletionMode = Enum("CompletionMode", ["none", "greedy", "sample"])
PoolKind = Enum("PoolKind", ["logarithmic", "linear"])
PoolStudents = Enum("PoolStudents", ["combined", "gold_only"])
Source = Enum("Source", ["gold", "corpus"])
Format = Enum("Format", ["distillkit", "axolotl_raw", "axolotl_prepared"])
Alignment = Enum("Alignment", ["current", "legacy"])
Shape = Enum("Shape", ["constant", "linear", "cosine", "step", "wsd"])
Divergence = Enum("Divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation", "renormalised", "truncated"])
GateBy = Enum("GateBy", ["confidence", "entropy", "margin", "learnt"])
WeightBy = Enum("WeightBy", ["none", "confidence", "entropy", "margin", "learnt"])
Control = Enum("Control", ["none", "smoothed", "shuffled"])
HardLabels = Enum("HardLabels", ["generated", "likeliest"])
HeadPath = Enum("HeadPath", ["fused", "full"])
Optimizer = Enum("Optimizer", ["adamw", "muon"])
GoldFractionOf = Enum("GoldFractionOf", ["sequences", "targets"])
Offload = Enum("Offload", ["none", "cpu", "nvme"])
ExportedStep = Enum("ExportedStep", ["last", "best", "none"])
IfBusy = Enum("IfBusy", ["fail", "wait", "skip"])
Tracker = Enum("Tracker", ["tensorboard", "wandb", "mlflow"])
Role = Enum("Role", ["teacher", "zero_shot", "gold_only", "weak_only", "combined", "ceiling", "control", "member"])


@dataclass
class ModelConfig:
    path: str = option(
        MISSING,
        "folder of a model and its tokenizer in Hugging Face layout, a glob matching one, or a hub name",
        content=True,
    )
    revision: str | None = option(None, "commit or tag of a hub name")
    dtype: Dtype = option(
        Dtype.auto,
        "type of the weights, loaded and run; auto: bfloat16 where this machine multiplies it fast, else float32",
    )
    attention: str | None = option(
        None,
        "attention kernel: sdpa_segments, eager_segments, flash_attention_2, ... (docs/options.md); "
        "null: the fastest with which the model passes its checks",
        result=False,
    )
    num_layers: int | None = option(None, "keep only this many first layers; null: all of them")
    trust_remote_code: bool = option(False, "run Python code that comes with the model; off unless you trust it")


@dataclass
class AdapterConfig:
    rank: int = option(16, "rank of the matrices A and B beside each layer's frozen weight")
    alpha: int = option(32, "the product B A is multiplied by alpha / rank (rslora: alpha / sqrt(rank))")
    dropout: float = option(0.0, "dropout on the adapter's input while it trains, a fraction")
    targets: list[str] | None = option(None, "linear layers, by the end of their names; null: all but the head")
    rslora: bool = option(False, "scale by alpha / sqrt(rank), stable at high ranks")
    dora: bool = option(False, "DoRA: train the magnitude of each weight separately from its direction; ZeRO 0 to 2")
    train_embeddings: bool = option(False, "also train the full embeddings; where they are tied to the head, set both")
    train_head: bool = option(False, "also train the full head; for LoRA on the head instead, name it in targets")


@dataclass
class StudentConfig(ModelConfig):
    adapter: AdapterConfig | None = option(
        None, "LoRA: train small matrices, everything else frozen; null: train all weights"
    )


@dataclass
class ColumnsConfig:
    text: str = option("text", "column of plain text")
    prompt: str = option("prompt", "column of the prompt, which precedes the completion")
    completion: str = option("completion", "column of the completion, the text that the model should generate")
    messages: str = option("messages", "column of a chat, a list of {role, content}")
    choices: str = option("choices", "column of alternative completions, for scoring")
    answer: str = option("answer", "column of the index of the right choice")
    tools: str = option("tools", "column of the tools that a chat's assistant may call")


@dataclass
class ChatConfig:
    supervise: Supervise = option(
        Supervise.last, "targets=completion: the last turn of the assistant, or all its turns; weight 0 excludes one"
    )
    supervise_thoughts: bool = option(False, "supervise the empty block of thoughts that some templates insert, too")
    template_options: dict[str, Any] = option(
        dict, "given to the chat template, as {enable_thinking: false}; it must read each of them"
    )
    date: str = option("2024-07-26", "what templates that write the date of today are given instead: YYYY-MM-DD")
    role: str = option("role", "field of a message that names who speaks")
    content: str = option("content", "field of a message with its text, or a list of parts of text")


@dataclass
class TextConfig:
    files: list[str] = option(
        MISSING,
        "files, folders or globs of .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, .arrow; plain, gz, zst or xz",
        content=True,
    )
    targets: Targets = option(
        Targets.auto,
        "positions to supervise: all, the completion's, only the first after the prompt (next), or the choices'; auto: "
        "choices where records have them, else all",
    )
    choices: list[str] | None = option(None, "choices of records with a prompt and none of their own; null: none")
    take: int | None = option(
        None, "read only the first so many records of all files, malformed ones included; null: all"
    )
    malformed: MalformedPolicy = option(
        MalformedPolicy.stop, "what to do on a malformed record: stop, or skip and count it"
    )
    end_token: bool = option(True, "append the tokenizer's end token to a text or completion")
    too_long: TooLongPolicy | None = option(
        None, "a prompt that does not fit the window: stop, skip and count it, or cut_left; null: as `malformed` says"
    )
    window_begin_token: bool | None = option(
        None,
        "begin each window of a long text with the tokenizer's beginning token; null: only for models that need it "
        "(Gemma)",
    )
    shape: TextShape = option(
        TextShape.auto,
        "how records are read: text, prompt_completion, chat, alpaca, sharegpt, preference (chosen alone), "
        "multiple_choice; auto: found from their columns, and logged",
    )
    chat: ChatConfig = option(ChatConfig, "how chats are rendered and supervised")
    columns: ColumnsConfig = option(ColumnsConfig, "names of the input's columns")


@dataclass
class CompletionConfig:
    how: CompletionMode = option(
        CompletionMode.none,
        "records with a prompt alone: none: used as they are; greedy, sample: the teacher completes them",
    )
    max_new_tokens: int = option(128, "longest completion, in tokens; the window bounds it too")
    temperature: float = option(
        1.0, "temperature of sampling; the captured distributions are those at `temperatures` all the same"
    )
    seed: int = option(0, "seed of the sampling")
    batch_records: int = option(
        16, "prompts completed together; changes rounding, so it is part of the cache's fingerprint"
    )


@dataclass
class DownloadsConfig:
    dir: str = option(
        "caches/.downloads", "folder for row groups of caches in object stores; may be shared", result=False
    )
    bytes: int = option(
        50_000_000_000,
        "maximum bytes of that folder; the least recently used row groups are deleted first",
        result=False,
    )


@dataclass
class CaptureConfig:
    name: str = option(MISSING, "first part of the cache folder's name")
    caches_dir: str = option("caches", "folder or address that holds all caches", result=False, address=True)
    cache: str | None = option(
        None,
        "exactly this folder or address for the cache (s3://bucket/prefix); null: caches_dir/name-fingerprint",
        result=False,
        address=True,
    )
    teacher: ModelConfig = option(ModelConfig, "the weak model")
    corpus: TextConfig = option(TextConfig, "unlabeled text")
    window: int = option(512, "longest sequence, in tokens; records are packed into it")
    kind: Kind = option(Kind.topk, "topk: k largest and an exact tail; sampled: draws; hybrid: k largest and draws")
    k: int = option(
        64, "largest logits kept per position; the others are one exact tail (topk) or are drawn from (hybrid)"
    )
    draws: int = option(50, "draws per position, for sampled and hybrid")
    seed: int = option(0, "seed of those draws")
    temperatures: list[float] = option(lambda: [1.0], "temperatures whose tail is kept; must contain 1")
    also_ids: str | None = option(
        None, "topk: cache of the same sequences whose ids are kept here too; null: none", content=True, address=True
    )
    downloads: DownloadsConfig = option(DownloadsConfig, "also_ids in an object store is read through this folder")
    complete: CompletionConfig = option(
        CompletionConfig, "completions by the teacher; its distributions are recorded while it generates"
    )
    records_per_shard: int = option(20_000, "records in one shard")
    only_fold: str | None = option(
        None, "j/k: capture only the sequences of fold j (0 to k - 1) of k, which their keys decide; null: all"
    )
    plans_dir: str | None = option(
        None, "local folder for tokenized text until it is captured; null: .plans beside the caches", result=False
    )
    batch_sequences: int = option(16, "sequences in one teacher forward", result=False)
    num_workers: int = option(1, "processes on this machine, each with a GPU or its share of the cores", result=False)
    share: str | None = option(
        None, "INDEX/COUNT: only these shards (0/16 to 15/16); null: all that no other process captures", result=False
    )
    lease_seconds: float = option(
        60.0, "a shard whose worker has not renewed its lease for this long is taken over", result=False
    )
    log_every_seconds: float = option(10.0, "seconds between plain progress lines", result=False)


@dataclass
class ImportConfig:
    name: str = option(MISSING, "first part of the cache folder's name")
    caches_dir: str = option("caches", "folder that holds all caches", result=False)
    source: str = option(MISSING, "folder or glob of the teacher outputs that another project stored", content=True)
    format: Format = option(MISSING, "format of those files: distillkit, axolotl_raw or axolotl_prepared")
    tokenizer: str = option(MISSING, "folder of that teacher's tokenizer in Hugging Face layout", content=True)
    alignment: Alignment | None = option(
        None, "axolotl_prepared only: row j describes token j + 1 (current) or token j (legacy)"
    )
    logprobs_column: str = option("logprobs", "axolotl_raw: column of the kept log-probabilities")
    messages_column: str = option("messages", "axolotl_raw: column of a chat, where there are no input_ids")
    text_column: str = option("text", "axolotl_raw: column of plain text, where there is no chat either")
    records_per_shard: int = option(1000, "source rows in one shard")
    log_every_seconds: float = option(10.0, "seconds between plain progress lines", result=False)


@dataclass
class RampConfig:
    shape: Shape = option(
        Shape.constant,
        "constant, linear, cosine, step; wsd: up from 0 until start, stable, from end on down to end_value",
    )
    start_fraction: float = option(0.0, "fraction of all steps at which the ramp begins")
    end_fraction: float = option(1.0, "fraction of all steps at which the ramp ends (wsd: at which it falls)")
    start_value: float = option(1.0, "factor on the weight before the ramp")
    end_value: float = option(0.0, "factor on the weight after the ramp")


@dataclass
class LmConfig:
    weight: float = option(1.0, "weight of the language-model term (cross entropy on known targets)")
    ramp: RampConfig = option(RampConfig, "how that weight changes over the steps")
    on: list[Source] = option(lambda: [Source.gold], "texts whose positions it reads: gold, corpus or both")


@dataclass
class GateConfig:
    min_confidence: float = option(0.0, "minimum probability of the teacher's top token, at T = 1")
    max_entropy: float | None = option(None, "maximum entropy of the teacher's distribution, nats; null: no limit")
    keep_fraction: float = option(1.0, "keep only this fraction of all positions: where the teacher is surest")
    by: GateBy = option(GateBy.confidence, "measure for keep_fraction: confidence, entropy (low), margin or learnt")
    per_class: bool = option(False, "keep_fraction of each class (the teacher's top token), counted over all caches")
    learn_on: str | None = option(
        None, "by=learnt: a capture of gold by the same teacher; null: gold_cache", content=True, address=True
    )
    drop_wrong: bool = option(False, "keep a position with a known target only if that is the teacher's top token")


@dataclass
class PositionWeightConfig:
    by: WeightBy = option(WeightBy.none, "trust in the teacher (0 to 1) that weights a position where a term reads it")
    power: float = option(1.0, "the weight is trust to this power")


@dataclass
class AdaptiveWeightConfig:
    every_steps: int = option(0, "steps between evaluations on dev that adapt the weight; 0: never")
    teacher_predictions: str | None = option(
        None, "the teacher's predictions-dev.parquet (or a glob matching one), whose score is compared", content=True
    )
    margin: float = option(
        0.01, "difference of scores (accuracy, exact match or -nll) below which the weight does not change"
    )
    factor: float = option(
        0.5, "the weight is multiplied by it when the student is better than the teacher, divided when worse"
    )
    least: float = option(0.0, "minimum of the weight's factor")


@dataclass
class KdConfig:
    weight: float = option(
        1.0, "weight of the distillation term (lambda of Xiao & Zhu, Foundations of Large Language Models, eq. 4.13)"
    )
    ramp: RampConfig = option(RampConfig, "how that weight changes over the steps")
    on: list[Source] = option(lambda: [Source.corpus], "texts whose positions it reads, where the teacher was captured")
    temperature: float = option(1.0, "softens teacher and student alike; must have been captured")
    temperature_squared: bool = option(
        True, "multiply the differentiated value by T^2, so that its gradient keeps its size as T grows"
    )
    divergence: Divergence = option(
        Divergence.forward_kl,
        "forward_kl, reverse_kl, jsd, total_variation: kept entries and tail; renormalised, truncated: kept ones alone",
    )
    beta: float = option(0.5, "jsd: from forward KL (0) to reverse KL (1)")
    tail_weight: float = option(1.0, "forward_kl: weight of its part between the masses of kept and tail; 1: exact KL")
    gate: GateConfig = option(GateConfig, "positions on which the teacher is used, by kd and confidence alike")
    position_weight: PositionWeightConfig = option(PositionWeightConfig, "weights of positions in S and N alike")
    adaptive_weight: AdaptiveWeightConfig = option(
        AdaptiveWeightConfig, "lowers the weight while the student is better than the teacher on dev"
    )
    control: Control = option(
        Control.none,
        "control for the teacher: smoothed (label smoothing of equal entropy), shuffled (other positions' outputs)",
    )


@dataclass
class HardConfig:
    weight: float = option(0.0, "weight of cross entropy with the teacher's hard labels; 0: off")
    ramp: RampConfig = option(RampConfig, "how that weight changes over the steps")
    on: list[Source] = option(lambda: [Source.corpus], "texts whose positions it reads")
    take: HardLabels = option(HardLabels.generated, "generated by the capture's complete.how; likeliest: its top token")


@dataclass
class ConfidenceConfig:
    weight: float = option(0.0, "weight of cross entropy with the student's own most likely token; 0: off")
    ramp: RampConfig = option(RampConfig, "how that weight changes over the steps")
    on: list[Source] = option(lambda: [Source.corpus], "texts whose positions it reads, where kd can read them")
    choices: list[str] | None = option(
        None,
        "completions among which the student's prediction is hardened, by their first tokens, each as often as the "
        "teacher predicts it; null: any token",
    )


@dataclass
class LossConfig:
    lm: LmConfig = option(LmConfig, "ground-truth labels")
    kd: KdConfig = option(KdConfig, "the teacher's distribution")
    hard: HardConfig = option(HardConfig, "the teacher's hard labels")
    confidence: ConfidenceConfig = option(ConfidenceConfig, "the student's own predictions")
    head: HeadPath = option(
        HeadPath.fused, "fused: one pass in chunks; full: whole logits and autograd, for any head", result=False
    )
    diagnostics_every_steps: int = option(
        10, "steps between lines with gradient cosines, agreement, tails; 0: never", result=False
    )


@dataclass
class OptimizerConfig:
    name: Optimizer = option(
        Optimizer.adamw, "adamw, or muon for hidden matrices with adamw for embeddings, head and vectors"
    )
    learning_rate: float = option(4e-5, "peak learning rate of AdamW")
    muon_learning_rate: float = option(
        0.002, "peak learning rate of Muon, whose orthogonal updates have a spectral norm of about 1"
    )
    muon_momentum: float = option(0.95, "decay of Muon's momentum")
    schedule: Shape = option(Shape.linear, "learning rate after the warm-up: constant, linear, cosine, step or wsd")
    step_at_fractions: list[float] = option(
        lambda: [0.5, 0.75], "step: fractions of the steps at which the learning rate is multiplied by step_factor"
    )
    step_factor: float = option(0.1, "step: factor on the learning rate at each of them")
    decay_fraction: float = option(0.2, "wsd: fraction of the steps, at the end, over which it decays")
    warmup_fraction: float = option(0.05, "fraction of the steps over which it warms up")
    final_fraction: float = option(0.0, "final learning rate, as a fraction of the peak")
    beta1: float = option(0.9, "AdamW's decay of the first moment")
    beta2: float = option(0.999, "AdamW's decay of the second moment")
    epsilon: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never")


@dataclass
class DeepspeedConfig:
    zero_stage: int = option(1, "ZeRO stage, 0 to 3: what is partitioned over the ranks", result=False)
    offload: Offload = option(
        Offload.none,
        "where optimizer state (at ZeRO 3 weights too) is kept: none (on the device), cpu or nvme",
        result=False,
    )
    nvme_path: str | None = option(None, "folder on a local disk for offload=nvme", result=False)
    overrides: dict[str, Any] = option(dict, "merged into the DeepSpeed configuration, as DeepSpeed spells it")


@dataclass
class CheckpointConfig:
    every_steps: int = option(
        100, "steps between checkpoints; 0: only when stopped and after the last step", result=False
    )
    keep: int = option(
        1, "newest checkpoints kept while running; they are deleted when the run is finished", result=False
    )
    keep_every_steps: int = option(
        0, "checkpoints of multiples of this step stay after the run is finished; 0: none", result=False
    )


@dataclass
class ScoringConfig:
    batch_tokens: int = option(4096, "tokens in one forward while scoring", result=False)
    max_new_tokens: int = option(
        0,
        "exact match: records without choices are completed by at most this many tokens and compared; 0: not measured",
    )
    teacher_predictions: str | None = option(
        None, "the teacher's predictions-test.parquet (or a glob matching one), for agreement with it", content=True
    )
    teacher_dev_predictions: str | None = option(
        None,
        "the teacher's predictions-dev.parquet (or a glob matching one): each evaluation on dev while training logs "
        "dev_imitation and dev_agreement",
        result=False,
        content=True,
    )
    few_shot: int = option(
        0, "this many answered records before each prompt with choices, as examples; in training runs with steps=0 only"
    )
    few_shot_from: TextConfig | None = option(
        None, "text whose first records are those examples; null: the gold set of the run"
    )


@dataclass
class EarlyStoppingConfig:
    patience: int = option(0, "the run ends after this many evaluations on dev without a better score; 0: never")
    min_delta: float = option(0.0, "improvement of the score (accuracy, exact match or -nll) that counts as better")


@dataclass
class HealthConfig:
    max_skipped_steps: int = option(
        5, "this many optimizer steps in a row that DeepSpeed skips for overflow end the run", result=False
    )
    warn_grad_norm: float = option(
        10.0, "warn of a gradient norm more than this many times its median over the last 100 steps", result=False
    )


@dataclass
class TrackingConfig:
    project: str | None = option(
        None,
        "project (wandb), experiment (MLflow); null: WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, else the study, else the "
        "folder of the runs",
        result=False,
    )
    entity: str | None = option(None, "wandb: user or team that owns the project; null: its own default", result=False)
    name: str | None = option(None, "the run's name there; null: the run folder's", result=False)
    tags: list[str] = option(list, "tags of the run, as [ablation, 7b]", result=False)
    run_id: str | None = option(
        None, "continue this run of the tracker; null: one that is found by the run folder's name", result=False
    )


@dataclass
class LauncherConfig:
    num_processes: int | None = option(None, "ranks on each node; null: one per GPU, or one", result=False)
    num_nodes: int = option(
        1, "nodes that train together, each with such ranks; see docs/clusters.md for the command of each", result=False
    )
    node_rank: int | None = option(
        None, "number of this node, from 0; null: as srun or torchrun has started this command", result=False
    )
    rendezvous_host: str | None = option(
        None, "name or address of node 0, where the nodes meet; null: as srun or torchrun has it", result=False
    )
    rendezvous_port: int | None = option(
        None, "free port of node 0 for that; null: as srun or torchrun has it, else 29500", result=False
    )
    rendezvous_seconds: float = option(600.0, "the nodes wait so long for each other at the start", result=False)
    time_limit: float | None = option(
        None, "minutes that this command may take: before that it saves and ends with exit code 75", result=False
    )
    leave_seconds: float = option(120.0, "seconds before that limit at which it starts to save", result=False)
    if_busy: IfBusy = option(
        IfBusy.fail,
        "where another process holds the run folder: wait a minute, then fail; wait without limit; or skip the run, so "
        "that several commands share a sweep",
        result=False,
    )
    hang_seconds: float = option(
        1800.0,
        "a step, checkpoint, batch of scoring or exported layer that takes longer counts as hanging and ends the run",
        result=False,
    )
    jobs: int = option(
        1, "runs of a sweep at a time on this machine, its cores and GPUs divided among them", result=False
    )
    log_every_seconds: float = option(10.0, "seconds between plain progress lines", result=False)
    quiet: bool = option(False, "show progress and warnings alone; log.txt has every line", result=False)


@dataclass
class ExportConfig:
    what: ExportedStep = option(
        ExportedStep.last,
        "step whose weights are scored and exported: the last, or the best on dev; none: the last is scored, and its "
        "weights are deleted then",
    )
    shard_bytes: int = option(
        5_000_000_000, "the model's weights are split into safetensors files of at most so many bytes", result=False
    )


@dataclass
class TrainConfig:
    name: str = option(MISSING, "first part of the run folder's name; what the report calls the experiment")
    role: Role | None = option(
        None, "part in a study, by which the report compares runs: the experiment sets it; null: none", result=False
    )
    study: str | None = option(None, "name of the study, set by study=", result=False)
    command: str | None = option(None, "how its study is run, set by study=", result=False)
    runs_dir: str = option("runs", "folder that holds all runs", result=False)
    seed: int = option(1, "seed of the data order and of every other draw")
    student: StudentConfig = option(StudentConfig, "the strong model, before training")
    cache: str | None = option(
        None,
        "folder of a capture, a glob matching one, or an address (s3://bucket/prefix); null: no teacher",
        content=True,
        address=True,
    )
    more_caches: list[str] = option(
        list, "further captures of the same tokenizer, mixed with `cache`", content=True, address=True
    )
    cache_weights: list[float] | None = option(
        None, "weights of `cache` and each of `more_caches` in the mixture; null: their numbers of sequences"
    )
    curriculum_parts: int = option(
        1, "cut each cache into this many parts by the teacher's entropy; an epoch starts with the lowest; 1: one part"
    )
    leave_out: str | None = option(
        None, "j/k: do not train on sequences of fold j (0 to k - 1) of k, of corpus and gold; null: on all"
    )
    k: int | None = option(None, "kept entries to read from the cache; null: all that were captured")
    gold: TextConfig | None = option(None, "trusted text with known targets; null: none")
    gold_cache: str | None = option(
        None,
        "a capture of the gold set, read instead of gold: targets and the teacher's distributions; null: read gold",
        content=True,
        address=True,
    )
    dev: TextConfig | None = option(None, "held-out text for decisions during training; null: none")
    test: TextConfig | None = option(None, "held-out text for the reported score; null: none")
    more_tests: dict[str, TextConfig] = option(
        dict, "further held-out texts by name, scored too: +more_tests={news: {files: [news.jsonl]}}", result=False
    )
    out_of_domain: list[str] = option(
        list, "those of more_tests whose domain is not that of the training texts", result=False
    )
    window: int = option(512, "longest gold sequence, in tokens; records are packed into it")
    gold_fraction: float = option(MISSING, "fraction of the global batch's sequences that are gold")
    gold_fraction_of: GoldFractionOf = option(
        GoldFractionOf.sequences, "sequences, or targets: that fraction of all supervised positions is gold, on average"
    )
    gold_epochs: float | None = option(None, "maximum passes over gold, then the corpus alone; null: no limit")
    global_batch: int = option(8, "sequences in one optimizer step, over all ranks")
    global_batch_tokens: int | None = option(
        None, "instead of global_batch: tokens in one optimizer step, counted as sequences of `window`", result=False
    )
    micro_batch: int = option(8, "maximum sequences in one forward of one rank", result=False)
    gradient_checkpointing: bool = option(
        False, "keep only each layer's input and recompute the rest in the backward", result=False
    )
    steps: int | None = option(None, "optimizer steps; give this or epochs; 0: the student is scored as it is")
    epochs: float | None = option(
        None, "passes over the corpus, all caches at once (over gold where gold_fraction is 1)"
    )
    loss: LossConfig = option(LossConfig, "the combined objective")
    optimizer: OptimizerConfig = option(OptimizerConfig, "AdamW or Muon, and the schedule")
    deepspeed: DeepspeedConfig = option(DeepspeedConfig, "the engine")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "checkpoints during training")
    scoring: ScoringConfig = option(ScoringConfig, "evaluation at the end")
    evaluate_every_steps: int = option(0, "steps between evaluations on dev while training; 0: never")
    early_stopping: EarlyStoppingConfig = option(
        EarlyStoppingConfig, "ends the run before its last step, decided on dev"
    )
    health: HealthConfig = option(HealthConfig, "limits that warn or end a run", result=False)
    trackers: list[Tracker] = option(
        list, "copies of metrics.jsonl elsewhere: tensorboard, wandb, mlflow", result=False
    )
    tracking: TrackingConfig = option(TrackingConfig, "how a run appears in the trackers", result=False)
    export: ExportConfig = option(ExportConfig, "which weights are exported, and how")
    launcher: LauncherConfig = option(LauncherConfig, "how ranks are started", result=False)
    dry_run: bool = option(
        False, "print of each run whether it is finished, to resume or to do, and start none", result=False
    )
    downloads: DownloadsConfig = option(
        DownloadsConfig, "caches in object stores are read through this folder", result=False
    )
