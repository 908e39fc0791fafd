"""Recipes, presets and small corpora: data that ``importlib.resources`` finds, and no code."""
