"""The serving engine: continuous batching on one pool of packed pages.

    engine = AsyncEngine(packed_model, EngineConfig(memory=1 << 30))
    engine.start()
    async for output in await engine.submit(Request(prompt=ids, params=SamplingParams(max_tokens=64))):
        print(output.text, end="")
    await engine.drain(30)
    engine.stop()

Requests, blocks, scheduler, sampler and runner are modules of their own, each of which works without the others'
innards; the scheduler, the blocks and the sampler also without a model.
"""

from kvcli.engine.async_engine import AsyncEngine
from kvcli.engine.config import EngineConfig, EngineStats
from kvcli.engine.request import (
    EngineStopped,
    FinishReason,
    Output,
    QueueFull,
    Request,
    SamplingParams,
    TokenLogprob,
    Usage,
)

__all__ = [
    "AsyncEngine",
    "EngineConfig",
    "EngineStats",
    "EngineStopped",
    "FinishReason",
    "Output",
    "QueueFull",
    "Request",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
]
