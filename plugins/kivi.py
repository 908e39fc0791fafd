"""KIVI: per-channel keys, per-token values, a window of recent tokens kept exact.

After Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024, arXiv:2402.02750. Keys
have a few channels of large magnitude, so each channel gets a scale over 32 consecutive tokens; values have none, so
each token gets one over 32 channels. Both are asymmetric with float16 scale and zero point: 1 bit a value beside the
codes.

The worked example of a plug-in: a class with ``family`` and ``name``, and its family's one method. It departs from the
paper in two ways. The search may give every layer widths of its own (``kvcli calibrate MODEL --recipe kivi``), and the
window is 32 tokens on top of an unfinished page, where the paper's keys alone have one.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcli.calibration.space import SearchSpace
from kvcli.plan import LayerPlan
from kvcli.quant.format import KVFormat

GROUP = 32


class KIVI:
    """Per-channel keys and per-token values in groups of 32, asymmetric, with a residual window of 32."""

    family = "quantizer"
    name = "kivi"

    def search_space(self, geometry: Sequence[LayerPlan]) -> SearchSpace:
        """Offer 2, 4 and 8 bits for keys and values of every layer."""
        widths = (2, 4, 8)
        return SearchSpace(
            k=tuple(KVFormat(bits, axis="channel", group=GROUP, symmetric=False) for bits in widths),
            v=tuple(KVFormat(bits, axis="token", group=GROUP, symmetric=False) for bits in widths),
            block_sizes=(GROUP,),
            sink_tokens=(0,),
            residual_windows=(32,),
        )
