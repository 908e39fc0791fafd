"""Recipes, presets and small corpora: data that ``importlib.resources`` finds, and the script that makes some."""
