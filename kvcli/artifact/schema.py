"""The JSON schema of ``kvcli.json``: every key an artifact may state, its type and its bounds.

The schema refuses what is malformed or absurdly large; what a plan means is for
:class:`~kvcli.plan.CachePlan` to judge.
"""

from __future__ import annotations

import reprlib
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend

from kvcli.errors import InputError

SCHEMA_VERSION = 3
MANIFEST = "kvcli.json"

_Schema = dict[str, Any]


def _object(properties: dict[str, _Schema], *, optional: tuple[str, ...] = ()) -> _Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(items: _Schema, *, most: int, least: int = 0) -> _Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _mapping(values: _Schema, *, most: int) -> _Schema:
    names = {"minLength": 1, "maxLength": 255}
    return {"type": "object", "propertyNames": names, "additionalProperties": values, "maxProperties": most}


def _integer(least: int, most: int) -> _Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _nullable(schema: _Schema) -> _Schema:
    return {**schema, "type": [schema["type"], "null"]}


_STRING: _Schema = {"type": "string", "minLength": 1, "maxLength": 4096}
_NAME: _Schema = {"type": "string", "minLength": 1, "maxLength": 200}
_SHA256: _Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_BOOLEAN: _Schema = {"type": "boolean"}

_FORMAT = _object(
    {
        "bits": _integer(1, 32),
        "axis": _NAME,
        "group": _integer(1, 4096),
        "symmetric": _BOOLEAN,
        "grid": _NAME,
        "scale_dtype": _NAME,
    },
    optional=("axis", "group", "symmetric", "grid", "scale_dtype"),  # an exact format states its bits alone
)

_LINEAR = _object(
    {"inputs": _array(_NAME, most=64, least=1), "bits": _integer(1, 32), "rank": _nullable(_integer(1, 2**20))}
)

_LAYER = _object(
    {
        "num_kv_heads": _integer(1, 4096),
        "head_dim": _integer(1, 4096),
        "k": _FORMAT,
        "v": _FORMAT,
        "kind": {"enum": ["full", "sliding"]},
        "window": _nullable(_integer(1, 10**9)),
        "rope": {"enum": ["before", "after"]},
        "transform": _NAME,
        "center": _BOOLEAN,
        "predictor": _nullable(_object({"k": _nullable(_LINEAR), "v": _nullable(_LINEAR)})),
        "anchor": {"type": "null"},
    },
    optional=("anchor",),  # stated by artifacts of the first versions
)

_PLAN = _object(
    {
        "block_size": _integer(1, 4096),
        "sink_tokens": _integer(0, 10**6),
        "residual_window": _integer(0, 10**6),
        "dtype": _NAME,
        "layers": _array(_LAYER, least=1, most=4096),
    }
)

SCHEMA: _Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "kvcli.json",
    **_object(
        {
            "schema_version": {"type": "integer", "enum": list(range(1, SCHEMA_VERSION + 1))},
            "kvcli_version": _NAME,
            "plan": _PLAN,
            "capacity": _PLAN,
            "context": _integer(1, 10**9),
            "budget": _object({"bits": {"type": "number", "exclusiveMinimum": 0, "maximum": 64}, "nominal": _BOOLEAN}),
            "stages": _array(
                _object({"name": _NAME, "settings": {"type": "object", "maxProperties": 1000}, "sha256": _SHA256}),
                most=100,
            ),
            "source": _object(
                {"model": _STRING, "sha256": _SHA256, "dtype": _NAME, "changed": _array(_NAME, most=1000)}
            ),
            "calibration": _object(
                {
                    "data": _STRING,
                    "sha256": _SHA256,
                    "tokens": _integer(0, 10**12),
                    "seed": _integer(0, 2**64 - 1),
                }
            ),
            "tools": _mapping(_NAME, most=1000),
            "files": _mapping(_object({"sha256": _SHA256, "size": _integer(0, 2**63 - 1)}), most=10**5),
        },
        optional=("capacity",),
    ),
}

# Draft 2020-12 takes 4.0 for an integer, and a plan would then count in floats.
_STRICT = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
_VALIDATOR = extend(Draft202012Validator, type_checker=_STRICT)(SCHEMA)

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 1


def validate(obj: object, where: str) -> dict[str, Any]:
    """Return ``obj`` if it is a manifest that this kvcli reads.

    Parameters
    ----------
    obj
        What ``kvcli.json`` holds.
    where
        The file, for the message.

    Raises
    ------
    InputError
        The schema is newer than this kvcli, or a value is missing, unknown, of the wrong type or out of bounds.
    """
    version = obj.get("schema_version") if isinstance(obj, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise InputError(f"{where} was written by a newer kvcli (schema {version}; this one reads {SCHEMA_VERSION}).")
    error = best_match(_VALIDATOR.iter_errors(obj))
    if error is not None:
        raise InputError(_sentence(error, where))
    assert isinstance(obj, dict)
    return obj


def _sentence(error: ValidationError, where: str) -> str:
    """Say which value is wrong and how, whatever its size: the library's messages quote the value whole."""
    message = error.message.replace(repr(error.instance), _BRIEF.repr(error.instance))
    place = error.json_path.removeprefix("$").removeprefix(".")
    return f"{where}: {place[:200]}{': ' if place else ''}{message[:300]}."
