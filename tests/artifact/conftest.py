"""A tiny model, a plan for it, and artifacts of both."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcli.artifact.tensors import expected_tensors
from kvcli.artifact.writer import ArtifactWriter
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat

SHA = "0" * 64


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def plan() -> CachePlan:
    """The model's plan: two layers, the first centred."""
    centred = LayerPlan(2, 8, KVFormat(4, group=8), KVFormat(2, "channel", group=16), center=True)
    return CachePlan((centred, LayerPlan(2, 8, KVFormat(8, group=8), KVFormat.exact())), sink_tokens=4)


@pytest.fixture(scope="session")
def manifest(plan: CachePlan) -> dict[str, Any]:
    """What a caller hands to commit."""
    return {
        "plan": plan.to_json(),
        "context": 2048,
        "budget": {"bits": 4.0, "nominal": False},
        "stages": [{"name": "search", "settings": {"steps": 3}, "sha256": SHA}],
        "source": {"model": "tiny", "sha256": SHA, "dtype": "float32", "changed": []},
        "calibration": {"data": "self", "sha256": SHA, "tokens": 512, "seed": 0},
    }


@pytest.fixture(scope="session")
def kv(plan: CachePlan) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, (_, shape) in expected_tensors(plan).items()}


@pytest.fixture(scope="session")
def fill(model: LlamaForCausalLM, kv: dict[str, torch.Tensor]) -> Callable[[ArtifactWriter], None]:
    """Put everything but the manifest into a writer."""

    def fill(writer: ArtifactWriter) -> None:
        model.config.save_pretrained(writer.path)
        writer.write_weights(model.state_dict().items())
        writer.write_tensors(kv)
        writer.write_json("report.json", {"kl": 0.25})

    return fill


@pytest.fixture(scope="session")
def pristine(
    tmp_path_factory: pytest.TempPathFactory, fill: Callable[[ArtifactWriter], None], manifest: dict[str, Any]
) -> Path:
    """An artifact that no test may change."""
    with ArtifactWriter(tmp_path_factory.mktemp("pristine") / "artifact") as writer:
        fill(writer)
        return writer.commit(manifest)


@pytest.fixture
def artifact(tmp_path: Path, pristine: Path) -> Path:
    """An artifact to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "artifact"))
