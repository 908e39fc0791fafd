"""Plug-ins are found, listed and loaded; a broken one hides nothing."""

from __future__ import annotations

import json

import pytest

from kvcli import plugins
from kvcli.errors import InputError


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An installed distribution ``extra-methods`` 1.2: one sound plug-in, and four that are not."""
    info = tmp_path / "extra_methods-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-methods\nVersion: 1.2\n")
    entries = ["[kvcli.plugins]", "sound = extra_methods:Sound", "absent = extra_methods:Absent"]
    entries += ["raises = extra_methods_raising:X", "stray = extra_methods:Stray", "hollow = extra_methods:Hollow"]
    (info / "entry_points.txt").write_text("\n".join(entries))
    (tmp_path / "extra_methods.py").write_text(
        'class Sound:\n    """Does one thing.\n\n    And more.\n    """\n    family = "quantizer"\n    name = "sound"\n'
        "    def search_space(self, geometry): ...\n"
        'class Hollow:\n    family = "quantizer"\n    name = "hollow"\n'
        'class Stray:\n    family = "poem"\n'
    )
    (tmp_path / "extra_methods_raising.py").write_text("raise RuntimeError('no such luck')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_discover_describes_each(site):
    found = {x.name: x for x in plugins.discover()}
    assert found["sound"] == plugins.PluginInfo(
        "sound", "quantizer", "extra-methods", "1.2", "extra_methods", "Does one thing."
    )
    assert found["absent"].error.startswith("AttributeError")
    assert found["raises"].error == "RuntimeError: no such luck"
    assert "poem" in found["stray"].error


def test_load_returns_the_class(site):
    assert plugins.load("sound").name == "sound"
    assert plugins.load("sound", family="quantizer").family == "quantizer"


@pytest.mark.parametrize(
    ("name", "family", "words"),
    [
        ("nonsense", None, ["'nonsense'", "sound"]),
        ("sound", "merger", ["no merger plug-in", "none"]),
        ("raises", None, ["'raises' cannot be loaded", "no such luck"]),
        ("stray", None, ["'stray' cannot be loaded", "poem"]),
        ("hollow", None, ["'hollow' cannot be loaded", "no search_space"]),
    ],
)
def test_load_says_what_is_wrong(site, name, family, words):
    with pytest.raises(InputError) as raised:
        plugins.load(name, family)
    for word in words:
        assert word in str(raised.value)


def test_the_command_lists_sound_and_broken(site, run_kvcli, clean_env):
    env = {"PYTHONPATH": f"{site}:{clean_env['PYTHONPATH']}"}
    done = run_kvcli("plugins", "--json", env=env)
    assert done.returncode == 0
    found = {x["name"]: x for x in json.loads(done.stdout)["plugins"]}
    assert found["sound"]["error"] is None
    assert found["sound"]["distribution"] == "extra-methods"
    assert found["raises"]["error"] == "RuntimeError: no such luck"
    done = run_kvcli("plugins", env=env)
    assert done.returncode == 0
    assert "Does one thing." in done.stdout
    assert "no such luck" in done.stderr
    assert "raises" not in done.stdout
