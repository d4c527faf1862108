"""Writes the chart's values.schema.json and README.md from the comments of values.yaml; `--check` compares instead."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "modelfleet"
README_SCHEMA = CHART / "README.md.in"

_KEY = re.compile(r"^( *)([\w.-]+):")
_COMMENT = re.compile(r"^ *# (--|@schema)? ?(.*)$")
_TYPES: tuple[tuple[type, str], ...] = (
    (bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object")
)  # fmt: skip
_MODEL = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "source"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,62}$", "description": "Name of the model."},
        "alias": {"type": "string", "pattern": "^[a-z][a-z0-9-]*$", "description": "Alias that shall name it."},
        "source": {"type": "string", "pattern": "^(/|hf://|s3://).+", "description": "Folder, hf:// or s3:// URL."},
        "graph": {"type": "string", "pattern": "[.]onnx$", "description": "The graph to take of a hub's repository."},
        "pools": {
            "type": "array",
            "items": {"type": "string"},
            "description": "Pools that alone serve it, of `inference.pools`.",
        },
    },
}


@dataclass(frozen=True, slots=True)
class Value:
    """A documented value: its path, default, description, and what `@schema` says of it."""

    path: tuple[str, ...]
    default: object
    description: str
    schema: dict[str, Any]


def read_values(text: str) -> tuple[Value, ...]:
    """Return the documented values in order. Raises ValueError for a value without a comment."""
    defaults = yaml.safe_load(text)
    found: list[Value] = []
    for path, comments in _commented_keys(text):
        default = _at(defaults, path)
        if any(value.path == path[: len(value.path)] for value in found):
            continue  # described by the value that it is part of
        description, schema = _read_comments(comments)
        if description:
            found.append(Value(path, default, description, schema))
        elif not isinstance(default, dict):
            raise ValueError(f"{'.'.join(path)} has no comment that starts with `# --`.")
    return tuple(found)


def schema_of(values: tuple[Value, ...]) -> dict[str, Any]:
    """Return the JSON schema of values: every key is known, optional and typed by its default or its `@schema`."""
    root = _block()
    for value in values:
        block = root
        for key in value.path[:-1]:
            block = block["properties"].setdefault(key, _block())
        block["properties"][value.path[-1]] = _leaf(value, values)
    root["properties"]["global"] = {"type": "object", "description": "Set by Helm for all charts."}
    root["properties"]["enabled"] = {"type": "boolean", "description": "A condition of charts that depend on this one."}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of modelfleet", **root}


def readme_of(values: tuple[Value, ...], introduction: str) -> str:
    """Return the chart's README: the introduction, and a table for each block of values."""
    lines = [introduction.rstrip(), "", "## Values", "", "Written by `make chart` from [values.yaml](values.yaml)."]
    section = None
    for value in values:
        if value.path[0] != section and len(value.path) > 1:
            section = value.path[0]
            lines += ["", f"### {section}", "", "| value | default | |", "|---|---|---|"]
        elif section is None:
            section = ""
            lines += ["", "### Names", "", "| value | default | |", "|---|---|---|"]
        lines.append(f"| `{'.'.join(value.path)}` | `{json.dumps(value.default)}` | {value.description} |")
    return "\n".join(lines) + "\n"


def outputs() -> dict[Path, str]:
    """Return the files that this writes, with their content."""
    values = read_values((CHART / "values.yaml").read_text())
    return {
        CHART / "values.schema.json": json.dumps(schema_of(values), indent=2, ensure_ascii=False) + "\n",
        CHART / "README.md": readme_of(values, README_SCHEMA.read_text()),
    }


def _commented_keys(text: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield the path of each key, and the comment lines right above it."""
    parents: list[tuple[int, str]] = []
    comments: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comments.append(line)
            continue
        if match := _KEY.match(line):
            indent = len(match[1])
            parents = [(depth, key) for depth, key in parents if depth < indent]
            parents.append((indent, match[2]))
            yield tuple(key for _, key in parents), comments
        comments = []


def _read_comments(comments: list[str]) -> tuple[str, dict[str, Any]]:
    description: list[str] = []
    schema: dict[str, Any] = {}
    for line in comments:
        match = _COMMENT.match(line)
        if match and match[1] == "@schema":
            schema = json.loads(match[2])
        elif match and (match[1] == "--" or description):
            description.append(match[2].strip())
    return " ".join(description), schema


def _at(defaults: Any, path: tuple[str, ...]) -> object:  # YAML
    for key in path:
        defaults = defaults[key]
    return defaults


def _block() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _leaf(value: Value, values: tuple[Value, ...]) -> dict[str, Any]:
    extra = dict(value.schema)
    if extra.pop("$pools", False):
        pool = _pool(values)
        extra = {"additionalProperties": {**pool, "type": ["object", "null"]}}
    if extra.pop("$models", False):
        extra = {"items": _MODEL}
    kind = next((name for cls, name in _TYPES if isinstance(value.default, cls)), "null")
    return {"type": kind, "description": value.description, "default": value.default, **extra}


def _pool(values: tuple[Value, ...]) -> dict[str, Any]:
    start = ("inference", "poolDefaults")
    own = tuple(
        Value(value.path[2:], value.default, value.description, value.schema)
        for value in values
        if value.path[:2] == start
    )
    block = _block()
    for value in own:
        inner = block
        for key in value.path[:-1]:
            inner = inner["properties"].setdefault(key, _block())
        inner["properties"][value.path[-1]] = _leaf(value, ())
    return block


def main() -> None:
    """Write the files, or with `--check` exit with 1 when one is not what would be written."""
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        if stale:
            sys.exit(f"Not fresh: {', '.join(path.name for path in stale)}. Run `make chart`.")
        return
    for path in stale:
        path.write_text(outputs()[path])
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
