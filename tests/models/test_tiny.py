"""The model that the self-test makes: one that the whole pipeline accepts, the same at each call."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.models.loading import load_model
from pipeline.models.model_files import tensor_sizes, weights_hash
from pipeline.models.tiny import PADDING_ROWS, Size, byte_characters, save_tiny_model
from pipeline.models.tokenizer import load_tokenizer, vocabulary_size

SIZE = Size(hidden=32, layers=2, heads=4, positions=64)


def test_any_text_is_its_bytes_and_comes_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tiny_model(tmp_path / "model", SIZE, seed=1))
    text = "caf\u00e9 12\t\u4e2d\n \U0001f642"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert vocabulary_size(tokenizer) == 256 + 2
    assert len({*byte_characters()}) == 256


def test_the_head_is_the_embedding_with_rows_behind_the_vocabulary(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", SIZE, seed=1)
    model = load_model(folder, dtype="float32", device=torch.device("cpu"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.shape == (258 + PADDING_ROWS, SIZE.hidden)
    sizes = tensor_sizes(folder)
    assert sizes["model.embed_tokens.weight"] == (258 + PADDING_ROWS, SIZE.hidden)
    assert "lm_head.weight" not in sizes
    assert sizes.keys() == {name for name, _ in model.named_parameters()}


def test_a_seed_gives_a_model_and_disturbs_no_other_draw(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    hashes = [weights_hash(save_tiny_model(tmp_path / str(i), SIZE, seed=seed)) for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(torch.rand(3), expected)
    assert hashes[0] == hashes[1] != hashes[2]
