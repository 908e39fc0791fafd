"""Calibration text that the model writes itself, where no data set can be had (after LLM-QAT, arXiv 2305.17888)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcli.models.loading import LoadedModel, added_bos

BATCH = 16

# Each sequence opens with the first token of one of these, so that what follows is of many kinds.
OPENINGS = (
    "The", "Once", "import", "Question", "#", "In", "User", "1.", "She", "Dear", "def", "According", "How", "{", "I",
    "Abstract",
)  # fmt: skip


@torch.inference_mode()
def write(
    loaded: LoadedModel, count: int, length: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Sample sequences from the model at temperature 1.

    Parameters
    ----------
    loaded
        The model; its own end of text does not end a sequence, since a document may well begin after it.
    count, length
        Sequences, and tokens of each.
    seed
        The same seed writes the same text on the same machine.
    progress
        Called with the tokens written and to be written.

    Returns
    -------
    Tensor
        int64 [count, length] on the CPU.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    generator = torch.Generator().manual_seed(seed)
    bos = added_bos(tokenizer)
    prefix = [] if bos is None else [bos]
    first = [tokenizer(x, add_special_tokens=False).input_ids[0] for x in OPENINGS]
    starts = torch.tensor([[*prefix, first[i % len(first)]] for i in range(count)])
    written: list[Tensor] = []
    for batch in starts.split(BATCH):
        ids = batch[:, :length]
        step, cache = ids, DynamicCache(config=model.config)
        while ids.shape[1] < length:
            logits = model(step.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            step = torch.multinomial(logits[:, -1].float().softmax(-1).cpu(), 1, generator=generator)
            ids = torch.cat((ids, step), dim=1)
            if progress is not None:
                progress(sum(x.numel() for x in written) + ids.numel(), count * length)
        written.append(ids)
    return torch.cat(written)
