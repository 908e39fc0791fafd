"""Plug-ins that ship with kvcli, one method a file; found through the entry-point group ``kvcli.plugins``."""
