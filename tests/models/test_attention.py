"""Each packed segment is computed as if it were alone, without a mask of [B, 1, S, S], under every kernel."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_flash_attention_utils as flash_utils

from models.test_loading import tiny
from pipeline.core.types import Batch, InputError
from pipeline.data.packing import Segment, collate_inputs, make_sequence
from pipeline.models import attention
from pipeline.models.compatibility import check_architecture, check_packing
from pipeline.models.forward import hidden_states
from pipeline.models.generation import generate
from pipeline.models.kernel_choice import fast_kernels, settle_attention, use_fastest_attention

CPU = torch.device("cpu")
SEGMENTS = [[20, 33, 1, 50], [7, 60, 21]]  # two rows; the second is padded
KERNELS = {"sdpa_segments": attention.sdpa_segments, "eager_segments": attention.eager_segments}


def tokens(number: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(number)).tolist())


def batch(lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Input ids and position ids [B, S]; the tokens of a segment follow from its length alone."""
    rows = [
        make_sequence([Segment(record_id=0, ids=tokens(length, length), targets=((0, 0),)) for length in row])
        for row in lengths
    ]
    return collate_inputs(rows)[:2]


def places(lengths: list[list[int]], width: int) -> Iterator[tuple[int, slice]]:
    """Of each segment its length, and its place in the rows laid end to end."""
    for b, row in enumerate(lengths):
        start = b * width
        for length in row:
            yield length, slice(start, start + length)
            start += length


# ----------------------------------------------------------------------------------- the kernels themselves


def test_segment_lengths_follow_from_the_position_ids() -> None:
    _, position_ids_BS = batch([[2, 3], [1]])
    assert position_ids_BS.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert attention.segment_lengths(position_ids_BS) == [2, 3, 1, 4]  # 4: padding
    assert attention.segment_lengths(torch.arange(6).expand(2, -1)) == [6, 6]  # a row never goes on in the next one
    assert attention.segment_lengths(torch.tensor([[0, 0, 0, 1]])) == [1, 1, 2]
    assert attention.segment_lengths(torch.tensor([[3, 4, 5], [6, 7, 0]])) == [3, 2, 1]  # position ids from 3 on
    arguments = attention.segment_arguments([2, 3, 1], CPU)
    assert arguments["cu_seq_lens_q"].tolist() == [0, 2, 5, 6]
    assert (arguments["max_length_q"], arguments["cu_seq_lens_q"].dtype) == (3, torch.int32)


def states(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query of 4 heads, key and value of 2, [1, heads, length, 8]: a part of larger tensors, as models hand them on."""
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, length, heads, 8, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    ]


def attend(name: str, parts: list[Tensor], lengths: list[int], window: int) -> Tensor:
    module = tiny("Llama", attn_implementation=name).model.layers[0].self_attn
    options = attention.segment_arguments(lengths, CPU) | {"scaling": 0.3, "dropout": 0.0}
    output, _ = KERNELS[name](module, *parts, torch.empty(1, 1, 0, window), **options)
    return output


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_outputs_and_gradients_of_a_segment_are_those_of_it_alone_to_the_last_bit(
    name: str, dtype: torch.dtype, window: int
) -> None:
    lengths = [20, 33, 1, 50, 7, 20]
    parts = [states(length, dtype) for length in lengths]
    row = [torch.cat([part[i].detach() for part in parts], dim=2).requires_grad_() for i in range(3)]
    output = attend(name, row, lengths, window)
    output.float().square().sum().backward()
    start = 0
    for length, part in zip(lengths, parts, strict=True):
        place = slice(start, start + length)
        alone = attend(name, part, [length], window)
        alone.float().square().sum().backward()
        assert torch.equal(output[:, place], alone)
        for whole, one in zip(row, part, strict=True):
            assert torch.equal(whole.grad[:, :, place], one.grad)
        start += length


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("name", KERNELS)
def test_a_segment_is_attention_with_a_mask(name: str, window: int) -> None:
    """The slow twin: all scores of one segment, and a mask."""
    query, key, value = states(23)
    place = torch.arange(23)
    mask = (place <= place[:, None]) & (place > place[:, None] - (window or 23))
    expected = functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    found = attend(name, [query, key, value], [23], window)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)


def test_what_a_kernel_cannot_compute_is_refused() -> None:
    module, row = tiny("Llama").model.layers[0].self_attn, states(5)
    lengths = attention.segment_arguments([5], CPU)
    packed = torch.empty(1, 1, 0, 0)
    for options in ({"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1, 4, 5, 5)}):
        with pytest.raises(InputError, match="expected plain scores, found a bias, sinks or a soft cap"):
            attention.sdpa_segments(module, *row, packed, **lengths, **options)
    for kernel in KERNELS.values():
        with pytest.raises(InputError, match="expected a model that hands on the lengths of segments"):
            kernel(module, *row, packed)
        with pytest.raises(InputError, match="hands on the lengths"):  # of another row
            kernel(module, *row, packed, **attention.segment_arguments([4], CPU))


def test_a_mask_that_is_not_causal_or_in_chunks_is_refused() -> None:
    config = transformers.LlamaConfig()
    call = {"batch_size": 1, "q_length": 9, "kv_length": 9, "config": config, "allow_is_causal_skip": False}
    make = functools.partial(attention.segments_mask, dense_mask=lambda **_: None)
    assert make(**call).shape == (1, 1, 0, 0)
    with pytest.raises(InputError, match="expected causal attention"):
        make(**call, use_vmap=True)
    with pytest.raises(InputError, match="found attention in chunks"):
        make(**call, local_size=4)
    config.sliding_window = 4
    assert make(**call, local_size=4).shape == (1, 1, 0, 4)


def test_flash_attention_of_torch_gets_the_borders_of_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reference instead of torch's kernel, which needs a GPU: what is proved are its arguments."""
    calls: list[dict[str, Any]] = []

    def reference(query: Tensor, key: Tensor, value: Tensor, *borders: Any, **options: Any) -> Tensor:
        calls.append({"borders": borders, **options})
        return varlen(query, key, value, borders[0], options["scale"], options["window_size"][0] + 1)

    monkeypatch.setattr(attention, "_has_fused_varlen", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference)
    for window in (0, 5):
        row = states(30)
        found = attend("sdpa_segments", row, [8, 22], window)
        assert torch.allclose(found, attend("eager_segments", row, [8, 22], window), atol=1e-5)
    starts, same, longest, _ = calls[0]["borders"]
    assert (starts.tolist(), same.tolist(), longest) == ([0, 8, 30], [0, 8, 30], 22)
    assert [call["window_size"] for call in calls] == [(-1, 0), (4, 0)]
    assert calls[0]["enable_gqa"]


def varlen(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float, window: int = 0) -> Tensor:
    """FlashAttention's varlen kernel, slowly: [P, heads, D] and the borders of segments -> [P, heads, D]."""
    outputs = []
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        part = [states[start:end].transpose(0, 1)[None] for states in (query, key, value)]
        place = torch.arange(end - start)
        mask = (place <= place[:, None]) & (place > place[:, None] - (window or end - start))
        output = functional.scaled_dot_product_attention(*part, mask, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


# ---------------------------------------------------------------------------------------- whole models

MODELS = [
    ("Llama", {}, "sdpa", "sdpa_segments"),
    ("Llama", {}, "eager", "eager_segments"),
    ("Mistral", {"sliding_window": 6}, "sdpa", "sdpa_segments"),
    ("Mistral", {"sliding_window": 6}, "eager", "eager_segments"),
    ("Gemma3Text", {"sliding_window": 6, "head_dim": 8}, "sdpa", "sdpa_segments"),
    ("Gemma2", {"sliding_window": 6, "head_dim": 8, "attn_logit_softcapping": 2.0}, "eager", "eager_segments"),
    ("GPT2", {}, "sdpa", "sdpa_segments"),
    ("GPTNeoX", {}, "sdpa", "sdpa_segments"),
    ("Qwen2", {}, "sdpa", "sdpa_segments"),
]


def gradients(model: Any, ids_BS: Tensor, positions_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    hidden_BSH = hidden_states(model, ids_BS, positions_BS)
    weights_BSH = torch.randn(hidden_BSH.shape, generator=torch.Generator().manual_seed(0))
    (hidden_BSH * weights_BSH).sum().backward()  # not its squares, whose sum the last norm makes constant
    return hidden_BSH.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "values", "dense", "by_segment"), MODELS)
def test_hidden_states_and_gradients_are_those_under_a_dense_mask(
    name: str, values: dict[str, Any], dense: str, by_segment: str
) -> None:
    lengths = [[20, 11, 1, 30], [7, 40]]
    expected, expected_gradients = gradients(tiny(name, attn_implementation=dense, **values), *batch(lengths))
    model = tiny(name, attn_implementation=by_segment, **values)
    found, found_gradients = gradients(model, *batch(lengths))
    assert torch.allclose(found, expected, atol=3e-5)
    assert found_gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        assert torch.allclose(found_gradients[key], gradient, atol=1e-4 * gradient.abs().max().item()), key
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, again_gradients = gradients(model.train(), *batch(lengths))
    assert torch.equal(again, found) or name == "GPT2"  # which has dropout in training
    if name != "GPT2":
        assert all(torch.equal(again_gradients[key], found_gradients[key]) for key in found_gradients)


@pytest.mark.parametrize("name", KERNELS)
def test_logits_of_a_segment_are_those_of_it_alone_to_the_last_bit(name: str) -> None:
    """Alone: the rest of the row is padding, so that products with weights have the same number of rows.

    With fewer rows a CPU may round them differently: without padding the logits agree as far as float32 does.
    """
    model = tiny("Llama", attn_implementation=name)
    ids_BS, positions_BS = batch(SEGMENTS)
    head, width = model.get_output_embeddings(), ids_BS.shape[1]
    with torch.no_grad():
        logits_PV = head(hidden_states(model, ids_BS, positions_BS).flatten(0, 1))
        for length, place in places(SEGMENTS, width):
            padded_BS, rest_BS = torch.zeros_like(ids_BS), torch.zeros_like(positions_BS)
            padded_BS[0, :length] = torch.tensor(tokens(length, length))
            rest_BS[0] = torch.cat([torch.arange(length), torch.arange(width - length)])
            rest_BS[1] = torch.arange(width)
            alone_PV = head(hidden_states(model, padded_BS, rest_BS).flatten(0, 1))
            assert torch.equal(logits_PV[place], alone_PV[:length])
            without_SV = head(hidden_states(model, padded_BS[:1, :length], torch.arange(length)[None])[0])
            assert torch.allclose(logits_PV[place], without_SV, atol=2e-5)


def test_flex_attention_keeps_segments_apart_in_one_row() -> None:
    """With one shape, that of the check: torch 2.13 writes C++ for a second one that does not compile."""
    lengths = [[3, 4, 2], [3, 4, 2]]
    expected, _ = gradients(tiny("Llama", attn_implementation="eager"), *batch(lengths))
    model = tiny("Llama", attn_implementation="flex_attention")
    try:
        check_packing(model)
    except (RuntimeError, ImportError) as error:
        pytest.skip(f"torch cannot compile FlexAttention here: {str(error)[:80]}")
    with torch.no_grad():
        assert torch.allclose(hidden_states(model, *batch(lengths)), expected, atol=3e-5)


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """FlashAttention's functions as slow references: the borders of the segments of each call; `dense` is not called.

    What is proved is the way from hidden_states through transformers to the kernel, not the kernel itself.
    """
    calls: list[list[int]] = []

    def varlen_reference(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, **options: Any) -> Tensor:
        assert options["causal"]
        assert isinstance(options["max_seqlen_q"], int)  # known on the host: no layer waits for the device
        calls.append(cu_seqlens_q.tolist())
        return varlen(q, k, v, cu_seqlens_q, options["softmax_scale"])

    def dense(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("expected the function for several segments")

    supported = collections.defaultdict(bool, max_seqlen_q=True, max_seqlen_k=True)
    arguments = functools.partial(flash_utils._process_flash_attention_kwargs, supports_mapping=supported)
    functions = (dense, varlen_reference, None, None, None), (arguments, None)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: functions)
    return calls


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX", "Qwen2"])
def test_flash_attention_gets_one_row_with_the_borders_of_its_segments(name: str, flash_calls: list[list[int]]) -> None:
    lengths = [[20, 11], [7, 19]]  # and 5 of padding
    expected, expected_gradients = gradients(tiny(name, attn_implementation="eager"), *batch(lengths))
    model = tiny(name)
    for module in (model.config, model.get_decoder().config):
        module._attn_implementation_internal = "flash_attention_2"  # as transformers sets it on a GPU
    found, found_gradients = gradients(model, *batch(lengths))
    assert flash_calls == [[0, 20, 31, 38, 57, 62]] * 2  # in each of two layers
    assert torch.allclose(found, expected, atol=3e-5)
    for key, gradient in expected_gradients.items():
        assert torch.allclose(found_gradients[key], gradient, atol=1e-4 * gradient.abs().max().item()), key
    check_packing(model)


def test_completions_are_those_of_the_dense_kernel() -> None:
    """Tokens after a KV cache have a dense mask, and texts of different lengths their padding at the left."""
    prompts = [torch.tensor(tokens(length, length)) for length in (3, 9, 5)]
    answers = [
        generate(
            tiny("Llama", attn_implementation=name),
            prompts,
            lambda _, logits_BV: logits_BV.argmax(dim=1),
            max_new_tokens=[6] * 3,
            end_ids=[()] * 3,
            vocabulary_size=60,
        )
        for name in ("sdpa", *KERNELS)
    ]
    assert answers[0] == answers[1] == answers[2]


# -------------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return output


def largest(name: str, window: int, segment: int, rows: int, *, trains: bool = True) -> int:
    model = tiny("Llama", attn_implementation=name, max_position_embeddings=window)
    ids_BS = torch.arange(rows * window).reshape(rows, window) % 60
    positions_BS = (torch.arange(window) % segment).expand(rows, -1)
    with Largest() as found, torch.set_grad_enabled(trains):
        hidden_BSH = hidden_states(model, ids_BS, positions_BS)
        if trains:
            hidden_BSH.square().mean().backward()
    return found.elements


@pytest.mark.parametrize("segment", [100, 2048])
def test_no_tensor_of_a_window_grows_with_its_square(segment: int) -> None:
    """2,048 tokens and 4 heads: the dense kernels hold their mask; by segment nothing is larger than the MLP."""
    assert largest("sdpa", 2048, 100, 2) >= 2 * 2048**2
    assert largest("sdpa_segments", 2048, segment, 2) == 2 * 2048 * 48  # as many as the MLP is wide


def test_a_text_of_a_window_of_8192_takes_memory_in_proportion() -> None:
    assert largest("sdpa_segments", 8192, 8192, 1, trains=False) == 8192 * 48


@pytest.mark.slow
def test_a_window_of_32768_with_batch_16_is_planned_without_a_dense_mask() -> None:
    """A dense mask would have 16 * 32,768^2 elements: 17 GB."""
    assert largest("sdpa_segments", 32_768, 1000, 16) == 16 * 32_768 * 48


class Reads(TorchDispatchMode):
    """How often a value is read from a tensor: on a GPU the host then waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", KERNELS)
def test_no_layer_reads_a_value_back(name: str) -> None:
    counts = []
    for num_layers in (1, 3):
        with Reads() as reads:
            hidden_states(tiny("Llama", attn_implementation=name, num_hidden_layers=num_layers), *batch(SEGMENTS))
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_position_ids_stay_on_the_host() -> None:
    ids_BS, positions_BS = batch(SEGMENTS)
    empty = torch.zeros(0)
    columns = dict.fromkeys((field.name for field in dataclasses.fields(Batch)), empty)
    moved = Batch(**columns | {"input_ids_BS": ids_BS, "position_ids_BS": positions_BS, "teacher": None}).to("meta")
    assert (moved.input_ids_BS.device.type, moved.position_ids_BS.device.type) == ("meta", "cpu")


# -------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("Llama", {}, "sdpa_segments"),
        ("GPT2", {}, "sdpa_segments"),
        ("Mistral", {"sliding_window": 6}, "sdpa_segments"),
        ("Mixtral", {"num_local_experts": 4}, "sdpa_segments"),
        ("Gemma2", {"head_dim": 8}, "eager_segments"),  # a soft cap, which sdpa has not
    ],
)
def test_the_fastest_kernel_that_passes_is_chosen_and_named(
    name: str, values: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(name, **values)
    with caplog.at_level(logging.INFO):
        settle_attention(model, None)
    assert model.config._attn_implementation == expected
    lines = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert len(lines) == 1
    assert f"{type(model).__name__}: attention {expected}" in lines[0]
    assert ("not sdpa_segments: " in lines[0]) == (expected != "sdpa_segments")
    check_architecture(model)


def test_a_chosen_kernel_stays() -> None:
    model = tiny("Llama", attn_implementation="eager")
    settle_attention(model, "eager")
    assert model.config._attn_implementation == "eager"


def test_a_model_with_attention_of_its_own_is_checked_with_it() -> None:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.FalconConfig(**sizes, alibi=False, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=r"expected packed segments not to attend .* \(attention sdpa\)"):
        use_fastest_attention(model)


def test_an_architecture_that_leaks_under_every_kernel_is_refused() -> None:
    for name in ("Bloom", "Mpt"):
        sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4} | ({"d_model": 32, "n_heads": 4, "n_layers": 2})
        config = getattr(transformers, f"{name}Config")(vocab_size=60, use_cache=False, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with pytest.raises(InputError, match="expected packed segments not to attend to each other"):
            use_fastest_attention(model)


def test_a_model_that_counts_positions_from_the_beginning_of_a_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its segments may be separate, but the same text would differ at another place."""
    model = tiny("GPT2", attn_implementation="sdpa_segments")
    embed = model.transformer.wpe.forward
    monkeypatch.setattr(model.transformer.wpe, "forward", lambda ids: embed(torch.arange(ids.numel())[None]))
    with pytest.raises(InputError, match="expected a segment to be the same at any place of its row"):
        check_packing(model)


def test_flash_attention_comes_first_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    cuda = torch.device("cuda")
    assert fast_kernels(cuda, torch.bfloat16)[0] == "flash_attention_2"
    assert fast_kernels(cuda, torch.float32)[0] == fast_kernels(CPU, torch.bfloat16)[0] == "sdpa_segments"


def test_the_kernel_is_not_written_into_a_saved_model(tmp_path: Path) -> None:
    model = tiny("Llama")
    settle_attention(model, None)
    model.save_pretrained(tmp_path)
    assert "segments" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
