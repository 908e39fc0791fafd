"""kvcli: calibrate a language model's KV cache to a bit budget, prove what it cost, and serve the result."""

__version__ = "0.1.0"
