"""The attention kernel of a model: the one that its options name, or the fastest that passes the checks."""

from __future__ import annotations

import torch
import transformers

from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.models.compatibility import check_architecture
from pipeline.models.forward import Model


def settle_attention(model: Model, chosen: str | None) -> None:
    """Check the model with the kernel that was chosen; with None find the fastest, and log its name."""
    if chosen is not None:
        check_architecture(model)
        return
    reasons = use_fastest_attention(model)
    name = model.config._attn_implementation
    log.info("%s: attention %s%s", type(model).__name__, name, f" ({'; '.join(reasons)})" if reasons else "")


def use_fastest_attention(model: Model) -> list[str]:
    """Set the first of the fast kernels with which the model passes the checks; returns why others before it are not.

    If none of them passes, transformers' choice is checked as the last: InputError.
    """
    usual, reasons = model.config._attn_implementation, []
    for name in fast_kernels(model.device, model.dtype):
        try:
            _set_attention(model, name)
            check_architecture(model)
        except torch.OutOfMemoryError:  # says nothing about the kernel, and another choice would change the last bits
            raise
        except Exception as error:  # whatever transformers, the model's own code or the kernel raises
            first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
            reasons.append(f"not {name}: {first_line}")
        else:
            return reasons
    model.set_attn_implementation(usual)
    check_architecture(model)
    return reasons


def fast_kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Kernels without a dense mask that may run here, the fastest first.

    On a CPU this order was measured. On GPUs it was not: `sdpa_segments` runs the FlashAttention in torch, its package
    takes soft caps too. FlexAttention runs where it is named: it compiles anew for some shapes, in training too.
    """
    is_half = dtype in (torch.float16, torch.bfloat16)
    has_flash = device.type == "cuda" and is_half and transformers.utils.is_flash_attn_2_available()
    return [*(["flash_attention_2"] if has_flash else []), "sdpa_segments", "eager_segments"]


def _set_attention(model: Model, name: str) -> None:
    model.set_attn_implementation(name)  # transformers leaves models as they are whose code has no exchangeable kernel
    if model.config._attn_implementation != name or model.get_decoder().config._attn_implementation != name:
        raise InputError("its code has attention of its own")
