"""LoRA: which weights are trained, merged weights and the exported adapter, ZeRO stages, resuming, rejected options."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.config.options import load_config, save_config
from pipeline.config.schema import AdapterConfig, Dtype, StudentConfig, TrainConfig
from pipeline.config.validate_train import check_train
from pipeline.core.files import RunPaths
from pipeline.core.types import InputError
from pipeline.models import lora
from pipeline.models.forward import Model
from pipeline.models.loading import open_model
from pipeline.models.saving import save_model
from pipeline.monitoring.health import model_flops, model_size
from pipeline.training import checkpoints
from support.commands import ROOT, composed, losses_of, prepare_run, run_ranks, script, train_arguments
from support.tiny import make_model

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("models") / "untied"
    return make_model(folder, tokenizer, seed=4, tie_word_embeddings=False)


def options_of(base: Path, **adapter: Any) -> StudentConfig:
    return StudentConfig(path=str(base), dtype=Dtype.float32, adapter=AdapterConfig(rank=4, **adapter))


def with_adapter(config: StudentConfig, *, seed: int = 3) -> Model:
    student = open_model(config, CPU)
    assert config.adapter is not None
    lora.add_adapter(student, config.adapter, seed=seed)
    return student


def load_plain(folder: Path) -> Model:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return model.eval()(torch.arange(40)[None]).logits


def changed_kinds(model: Model, base: Model) -> set[str]:
    """The kinds of the weights that differ from the base's in any bit."""
    before = base.state_dict()
    return {n.split(".")[-2] for n, weight in model.state_dict().items() if not torch.equal(weight, before[n])}


# ------------------------------------------------------------ merged weights and the adapter alone

ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FULLY_TRAINED = {"train_embeddings": True, "train_head": True}
CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("student", {}, ALL_LINEAR),
    ("student", {"targets": ["q_proj", "mlp.down_proj"], "rslora": True}, {"q_proj", "down_proj"}),
    ("student", {"dora": True}, ALL_LINEAR),
    ("student", FULLY_TRAINED, ALL_LINEAR | {"embed_tokens", "lm_head"}),
    ("untied", FULLY_TRAINED, ALL_LINEAR | {"embed_tokens", "lm_head"}),
    ("untied", {"train_head": True}, ALL_LINEAR | {"lm_head"}),
    ("untied", {"train_embeddings": True}, ALL_LINEAR | {"embed_tokens"}),
    ("untied", {"targets": ["q_proj", "lm_head"]}, {"q_proj", "lm_head"}),
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # peft, about each fully trained tied model
@pytest.mark.parametrize(("which", "adapter", "kinds"), CASES)
def test_merged_weights_and_the_adapter_alone_are_the_trained_student(
    which: str,
    adapter: dict[str, Any],
    kinds: set[str],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """In float32, logits of up to 11 agree to 1e-4, and weights that are not trained in every bit."""
    base = request.getfixturevalue(which)
    config = options_of(base, **adapter)
    student = with_adapter(config)
    torch.manual_seed(5)
    for parameter in student.parameters():  # as if trained
        if parameter.requires_grad:
            parameter.data += 0.04 * torch.randn_like(parameter)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    weights = lora.merge_adapter(config, student.state_dict(), tmp_path / "adapter")
    assert all(torch.equal(before[name], weight) for name, weight in student.state_dict().items())
    save_model(student, weights, tokenizer, tmp_path / "model", whole=lambda one: one, shard_bytes=10**9)
    expected, merged = logits(student), load_plain(tmp_path / "model")
    assert (expected - logits(load_plain(base))).abs().max() > 1
    assert (logits(merged) - expected).abs().max() < 1e-4
    assert merged.state_dict().keys() == load_plain(base).state_dict().keys()
    assert changed_kinds(merged, load_plain(base)) == kinds
    alone = peft.PeftModel.from_pretrained(load_plain(base), tmp_path / "adapter")
    assert (logits(alone) - expected).abs().max() < 1e-4
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_seed_alone_determines_the_initial_weights(student: Path) -> None:
    torch.manual_seed(99)
    first = with_adapter(options_of(student)).state_dict()
    torch.rand(7)
    assert all(
        torch.equal(weight, first[name]) for name, weight in with_adapter(options_of(student)).state_dict().items()
    )
    other = with_adapter(options_of(student), seed=4)
    differing = {name for name, weight in other.state_dict().items() if not torch.equal(weight, first[name])}
    assert differing == {name for name in first if "lora_A" in name}
    assert {name for name, p in other.named_parameters() if p.requires_grad} == {n for n in first if "lora_" in n}
    assert torch.equal(logits(other), logits(load_plain(student)))  # B is 0


def test_flops_with_frozen_weights_are_those_that_torch_counts(student: Path) -> None:
    """A frozen weight is in two products, a trained one in three; half of the tokens pass through the head."""
    from torch.utils.flop_counter import FlopCounterMode

    model = with_adapter(options_of(student))
    model.set_attn_implementation("eager")
    # otherwise torch does not compute the first layer's gradient of its input
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(48).reshape(2, 24), logits_to_keep=12).logits.sum().backward()
    size = model_size(model)
    assert model_flops(size, tokens=48, supervised=24, window=24) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert size.frozen_head == size.head
    assert 0 < size.body - size.frozen_body == sum(p.numel() for p in model.parameters() if p.requires_grad)


# -------------------------------------------------------------------------------------------- runs


def lora_arguments(base: Path, data: Path, cache: Path, *more: str) -> list[str]:
    """Eight steps with LoRA."""
    changes = {"steps": 8, "micro_batch": 1, "optimizer__learning_rate": 0.01}
    return [*train_arguments(base, data, str(cache), **changes), "adapter=lora", "student.adapter.rank=4", *more]


@pytest.mark.slow
def test_adapter_lora_is_the_only_option_that_a_run_needs(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    script("train", *lora_arguments(student, data, cache), cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    merged, base = load_plain(run / "model"), load_plain(student)
    assert changed_kinds(merged, base) == ALL_LINEAR
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter")  # it names its base
    assert (logits(alone) - logits(merged)).abs().max() < 1e-4
    assert losses_of(run)[-1] < losses_of(run)[0]
    assert json.loads((run / "result.json").read_text())["test"]["num_records"] == 20
    assert json.loads((run / "identity.json").read_text())["options"]["student"]["adapter"]["rank"] == 4
    card = (run / "model" / "README.md").read_text()
    assert "A LoRA adapter of rank 4 and alpha 32 on all linear layers but the head was trained, and is merged" in card
    assert str(student.parent) not in card
    assert "adapter on 21 layers (down_proj, " in (run / "log.txt").read_text()


def assert_same_results(folders: list[Path]) -> None:
    """In float32: the same losses within 1e-4, the same final weights within 2e-4, and equal FLOPs."""
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in folders]
    losses = [torch.tensor([row["loss"] for row in run_rows]) for run_rows in rows]
    weights = [load_plain(folder / "model").state_dict() for folder in folders]
    for folder, run_rows, run_losses, run_weights in zip(folders, rows, losses, weights, strict=True):
        assert len(run_rows) == 8
        assert torch.allclose(run_losses, losses[0], rtol=1e-4), (folder.name, (run_losses / losses[0] - 1).abs().max())
        assert [row["model_flops"] for row in run_rows] == [row["model_flops"] for row in rows[0]]
        for name, weight in weights[0].items():
            assert torch.allclose(run_weights[name], weight, atol=2e-4), (folder.name, name)


def same_bits(first: Path, second: Path) -> bool:
    files = ("model/model.safetensors", "adapter/adapter_model.safetensors")
    return losses_of(first) == losses_of(second) and all(
        (first / file).read_bytes() == (second / file).read_bytes() for file in files
    )


@pytest.mark.slow
def test_every_zero_stage_trains_exports_stops_and_resumes(
    student: Path, untied: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """Two ranks at ZeRO 0 to 3; 1 and 3 also stopped and resumed, bit by bit; one checkpoint is resumed by one rank."""

    def prepare(name: str, stage: int, *more: str, base: Path = student, stop: bool = False) -> Path:
        arguments = lora_arguments(base, data, cache, f"deepspeed.zero_stage={stage}", *more)
        return prepare_run(tmp_path / name, arguments, stop=stop)

    stages = [prepare(f"zero{stage}", stage) for stage in (0, 1, 3)]
    stages += [prepare("zero2-checkpointing", 2, "gradient_checkpointing=true")]
    resumed = [prepare(f"zero{stage}-resumed", stage, stop=True) for stage in (1, 3)]
    on_head = ("student.adapter.targets=[q_proj,lm_head]", "student.adapter.dropout=0.1")
    heads = [prepare(f"head{stage}", stage, *on_head, base=untied) for stage in (1, 3)]
    both = ("student.adapter.train_embeddings=true", "student.adapter.train_head=true")
    fully_trained = [prepare(f"fully-trained{stage}", stage, *both) for stage in (1, 3)]
    other_ranks = prepare("other-ranks", 1, *both, stop=True)
    dora = prepare("dora", 2, "adapter=dora")
    run_ranks(2, [*stages, *resumed, *heads, *fully_trained, other_ranks, dora])
    for folders in (stages, heads, fully_trained):
        assert_same_results(folders)
    for uninterrupted, stopped in zip(stages[1:3], resumed, strict=True):
        assert same_bits(uninterrupted, stopped), uninterrupted.name
    assert losses_of(dora)[-1] < losses_of(dora)[0]
    # a checkpoint holds the trained weights and no others
    paths, config = RunPaths(folder=other_ranks), load_config(other_ranks / "config.yaml", TrainConfig)
    (states,) = paths.checkpoints.glob("step-*/mp_rank_00_model_states.pt")
    saved = {name.removeprefix("student.") for name in torch.load(states, weights_only=False)["module"]}
    model = with_adapter(options_of(student, **FULLY_TRAINED))
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert saved == trained
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert checkpoints.checkpoint_bytes(model.parameters(), zero_stage=1) == size * (4 + 12)
    # one rank at ZeRO 3 resumes from it
    published = checkpoints.published(paths)
    assert published is not None
    config.deepspeed.zero_stage = 3
    assert not checkpoints.fits(published, config, world_size=1)
    checkpoints.convert(paths, published)
    save_config(config, other_ranks / "config.yaml")
    paths.stop.unlink()
    run_ranks(1, [other_ranks])
    assert_same_results([fully_trained[0], other_ranks])


# ----------------------------------------------------------------------------------- rejected options


@pytest.mark.parametrize(
    ("which", "adapter", "message"),
    [
        ("student", {"targets": ["q_proj", "qkv"]}, "found 'qkv'; LlamaForCausalLM has down_proj, gate_proj, k_proj"),
        ("student", {"targets": ["proj"]}, "expected the ends of names of linear layers, found 'proj'"),
        ("student", {"targets": ["embed_tokens"]}, "expected the ends of names of linear layers, found 'embed_tokens'"),
        ("student", {"targets": ["lm_head"]}, "because its matrix is also the embeddings, which would change with it"),
        ("student", {"train_head": True}, "because they are one matrix in this LlamaForCausalLM, found False and True"),
        ("untied", {"train_head": True, "targets": ["lm_head"]}, "because train_head trains its full weight"),
    ],
)
def test_an_adapter_that_does_not_fit_the_student_is_rejected(
    which: str, adapter: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        lora.check_adapter(options_of(request.getfixturevalue(which), **adapter))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter=dora", "deepspeed=zero3"], "student.adapter.dora: expected deepspeed.zero_stage 0 to 2, because"),
        (["adapter=lora", "student.adapter.rank=0"], "adapter_rank: expected at least 1, found 0"),
        (["adapter=lora", "student.adapter.dropout=1.5"], "adapter_dropout: expected 0 to 1, found 1.5"),
        (["adapter=lora", "student.adapter.targets=[]"], "expected names of linear layers or null for all, found []"),
    ],
)
def test_contradictory_options_are_rejected(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_train(composed("train", "study=demo", *overrides))


def test_without_peft_only_an_adapter_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else real(name))
    check_train(composed("train", "study=demo"))
    with pytest.raises(InputError, match=re.escape('expected the package peft, found none; pip install ".[lora]"')):
        check_train(composed("train", "study=demo", "adapter=lora"))


def test_an_option_of_an_adapter_chooses_it(tmp_path: Path) -> None:
    done = script("train", "study=demo", "experiment=gold_only", "student.adapter.rank=4", "--cfg", "job", cwd=tmp_path)
    assert "adapter:\n    rank: 4\n" in done.stdout


def test_peft_is_not_imported_without_an_adapter() -> None:
    code = "import sys, pipeline.training.driver, pipeline.training.worker; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
