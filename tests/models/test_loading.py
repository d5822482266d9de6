"""Packed segments do not attend to each other; our logits are the model's own; windows fit the model."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.core.files import is_hub_name
from pipeline.core.runtime import has_fast_matmul
from pipeline.core.types import InputError
from pipeline.data.packing import Segment, collate_inputs, make_sequence
from pipeline.models import compatibility
from pipeline.models.compatibility import check_logits_path, check_packing, check_window, max_positions
from pipeline.models.forward import hidden_states, logits
from pipeline.models.loading import load_model
from pipeline.models.model_files import weights_hash
from pipeline.models.paths import model_folder
from pipeline.models.prepack import PrepackedLinear, prepack

CPU = torch.device("cpu")


def tiny(name: str, **config_values: Any) -> Any:
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}Config")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    if name == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 64}
    else:
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
    sizes |= config_values
    config = config_class(**sizes, pad_token_id=0, bos_token_id=0, eos_token_id=1, use_cache=False)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def packed_hidden(model: Any, *parts: tuple[int, ...]) -> torch.Tensor:
    segments = [Segment(record_id=i, ids=ids, targets=((0, 0),)) for i, ids in enumerate(parts)]
    input_ids_BS, position_ids_BS, _ = collate_inputs([make_sequence(segments)])
    with torch.no_grad():
        return hidden_states(model, input_ids_BS, position_ids_BS)[0]


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, attention) for name in ("Llama", "Qwen2", "GPT2") for attention in ("sdpa", "eager")]
    + [("Gemma2", "eager")],
)
@pytest.mark.parametrize("training", [True, False])
def test_changing_one_segment_never_changes_another(name: str, attention: str, training: bool) -> None:
    model = tiny(name, attn_implementation=attention).train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = packed_hidden(model, (3, 4, 5), (6, 7, 8, 9), (10,), (11, 12))
    after = packed_hidden(model, (3, 4, 5), (40, 41, 42, 43), (10,), (11, 12))
    assert torch.equal(before[:3], after[:3])
    assert torch.equal(before[7:], after[7:])
    assert not torch.allclose(before[3:7], after[3:7])
    alone = packed_hidden(model, (11, 12))
    assert torch.allclose(before[8:], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config_values"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"tie_word_embeddings": False}),
        ("Gemma2", {"final_logit_softcapping": 5.0}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 3.0}),
    ],
)
def test_logits_are_the_models_own(name: str, config_values: dict[str, Any]) -> None:
    model = tiny(name, **config_values)
    check_logits_path(model)
    hidden_NH = packed_hidden(model, (3, 4, 5, 6))
    model_logits_SV = model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits[0]
    assert torch.allclose(logits(model, hidden_NH, 60), model_logits_SV, atol=1e-5)


def test_an_architecture_with_other_logits_is_rejected() -> None:
    model = tiny("Llama")
    forward = model.forward

    def with_scaled_logits(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = with_scaled_logits
    with pytest.raises(InputError, match=r"expected head\(hidden\) to equal the model's own logits"):
        check_logits_path(model)


@pytest.mark.parametrize("name", ["Bloom", "OPT"])
def test_an_architecture_that_leaks_between_packed_segments_is_rejected(name: str) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "OPT":
        sizes |= {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    config = getattr(transformers, f"{name}Config")(**sizes, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match="expected packed segments not to attend to each other, found that they do"):
        check_packing(model)


def test_a_mixture_of_experts_is_accepted_and_its_rounding_named(caplog: pytest.LogCaptureFixture) -> None:
    """Its last bits depend on the other tokens of a batch, but segments do not attend to each other."""
    model = tiny("Mixtral", num_local_experts=8)
    with caplog.at_level(logging.INFO):
        check_packing(model)
    assert "MixtralForCausalLM: other tokens of a batch change a hidden state by up to" in caplog.text


def test_a_weak_leak_is_rejected_in_a_mixture_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of a hidden state of the segment before reaches the next one."""
    model = tiny("Mixtral", num_local_experts=8)

    def leaking(model: Any, ids_BS: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
        hidden_BSH = hidden_states(model, ids_BS, positions_BS)
        return hidden_BSH + 0.01 * hidden_BSH.roll(1, dims=1)

    monkeypatch.setattr(compatibility, "hidden_states", leaking)
    with pytest.raises(InputError, match="found that they do .* another segment moves a hidden state by 0.0"):
        check_packing(model)


def test_hidden_states_that_are_no_numbers_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, ids_BS: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
        hidden_BSH = hidden_states(model, ids_BS, positions_BS)
        hidden_BSH[:, 8] = torch.nan
        return hidden_BSH

    monkeypatch.setattr(compatibility, "hidden_states", broken)
    with pytest.raises(InputError, match="expected packed segments not to attend to each other"):
        check_packing(tiny("Llama"))


def test_num_layers_keeps_the_first_layers(student: Path) -> None:
    full = load_model(student, dtype="float32", device=CPU)
    cut = load_model(student, dtype="float32", device=CPU, num_layers=1)
    assert len(cut.model.layers) == 1
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(cut.state_dict()[first], full.state_dict()[first])
    with pytest.raises(InputError, match="num_layers: expected 1 to 3 .*, found 4"):
        load_model(student, dtype="float32", device=CPU, num_layers=4)


def test_a_missing_weight_is_rejected_and_not_left_random(student: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(student)
    state = {name: w for name, w in model.state_dict().items() if "layers.0.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        InputError, match=r"expected a weight for every parameter, found none that fits .*layers\.0\.mlp"
    ):
        load_model(tmp_path, dtype="float32", device=CPU)


def test_pickled_weights_are_rejected(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"expected weights as \*\.safetensors, found none"):
        weights_hash(tmp_path / "m")
    with pytest.raises(InputError, match=r"expected weights as \*\.safetensors, found none"):
        load_model(tmp_path / "m", dtype="float32", device=CPU)


def test_one_changed_weight_changes_the_weights_hash(student: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(student)
    model.save_pretrained(tmp_path / "a")
    model.model.norm.weight.data[0] += 1e-3
    model.save_pretrained(tmp_path / "b")
    assert weights_hash(tmp_path / "a") != weights_hash(tmp_path / "b")


def test_a_window_longer_than_the_models_positions_is_rejected(student: Path) -> None:
    check_window(student, 256)
    with pytest.raises(InputError, match="window: expected at most 256 .*, found 257"):
        check_window(student, 257)


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 64}, 64),
        ({"rope_scaling": {"type": "su", **LONG}, "original_max_position_embeddings": 64}, 64),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32, **LONG}}, 32),
        ({"rope_parameters": {"full": {"rope_type": "longrope", "original_max_position_embeddings": 32}}}, 32),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 256),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": None}, 256),
    ],
)
def test_a_window_beyond_which_rope_depends_on_the_batch_is_rejected(
    values: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    config = {"max_position_embeddings": 256, "original_max_position_embeddings": None, **values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_window(tmp_path, expected)
    assert max_positions(tmp_path) == expected  # scoring and generation have the same limit
    with pytest.raises(InputError, match=f"window: expected at most {expected} .*, found {expected + 1}") as raised:
        check_window(tmp_path, expected + 1)
    rope = json.dumps(values)
    for rope_type in ("longrope", "su", "dynamic"):
        assert (f"RoPE of type {rope_type}," in str(raised.value)) == (f'"{rope_type}"' in rope)


@pytest.mark.parametrize(("longest", "is_same"), [(16, True), (17, False)])
def test_longrope_depends_on_the_batch_beyond_its_original_length(longest: int, is_same: bool) -> None:
    """The reason for the limit: one text alone, and beside a longer one."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, "rope_theta": 10_000.0, **LONG}
    model = tiny("Llama", max_position_embeddings=64, rope_parameters=rope)
    ids_BS, positions_BS = torch.arange(2 * longest).reshape(2, -1) % 60, torch.arange(longest).expand(2, -1)
    with torch.no_grad():
        alone = hidden_states(model, ids_BS[:1, :8], positions_BS[:1, :8])[0]
        beside = hidden_states(model, ids_BS, positions_BS)[0, :8]
    assert torch.allclose(alone, beside, atol=1e-5) == is_same


def test_hub_names_differ_from_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "student").mkdir(parents=True)
    for name in ("EleutherAI/pythia-70m", "owner/name", "owner/a_b.c-d"):
        assert is_hub_name(name)
    for path in ("models/student", "./name", "../name", "/name", "gpt2", "a/b/c", "models/stud*", "~/model", "a b/c"):
        assert not is_hub_name(path)


def test_a_model_path_that_does_not_exist_is_rejected() -> None:
    with pytest.raises(InputError, match="model path: expected '/no/where' to match one path, found nothing"):
        model_folder("/no/where")
    with pytest.raises(InputError, match="expected 'nobody/nothing' to be a folder or a model on the hub"):
        model_folder("nobody/nothing")


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPT2"])
def test_prepacked_weights_give_the_same_bits(name: str) -> None:
    """With and without biases, tied and untied heads; one token and many. GPT-2's Conv1D layers are not replaced."""
    if not has_fast_matmul(torch.bfloat16, CPU):
        pytest.skip("this CPU has no fast bfloat16 instructions: nothing is prepacked")
    model = tiny(name, tie_word_embeddings=name == "Llama").to(torch.bfloat16)
    prepacked = prepack(copy.deepcopy(model))
    assert any(isinstance(module, PrepackedLinear) for module in prepacked.modules())
    assert not any(type(module) is torch.nn.Linear for module in prepacked.modules())
    for size in (1, 7, 40):
        ids_BS = torch.arange(2 * size).reshape(2, size) % 60
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids_BS).logits, prepacked(input_ids=ids_BS).logits)


def test_float32_layers_are_not_replaced() -> None:
    assert not any(isinstance(module, PrepackedLinear) for module in prepack(tiny("Llama")).modules())


@pytest.mark.parametrize(
    ("device", "partition", "place"),
    [
        ("cpu", None, None),
        ("cuda:1", None, {"": torch.device("cuda:1")}),
        ("cuda:1", {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}, None),
    ],
)
def test_weights_go_straight_to_a_gpu(
    device: str, partition: Any, place: Any, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU they stay where the file is mapped into memory; at ZeRO 3 DeepSpeed places them."""
    asked: dict[str, Any] = {}

    def load(folder: Path, **options: Any) -> Any:
        asked.update(options)
        raise InterruptedError

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(InterruptedError):
        load_model(student, dtype="bfloat16", device=torch.device(device), partition=partition)
    assert asked["device_map"] == place
