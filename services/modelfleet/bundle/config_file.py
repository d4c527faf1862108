"""JSON files of a model's folder, read so that nothing they say is misread: each value by its type, or refused."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelfleet.runtime.errors import InvalidBundleError

_SHOWN = 100  # characters of a value


class ConfigFile:
    """One JSON object. A key that is absent, or null, is None; `there` says whether the file exists."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        value = read_json(self.path, {})
        if not isinstance(value, dict):
            raise InvalidBundleError(f"{self.path} is not a JSON object. Fetch it again.", field=name)
        self.there = self.path.is_file()
        self.values: Mapping[str, Any] = value

    def integer(self, key: str) -> int | None:
        """Return an integer."""
        found: int | None = self._typed(
            key, "an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)
        )
        return found

    def positive(self, key: str) -> int | None:
        """Return an integer of at least 1."""
        value = self.integer(key)
        if value is not None and value < 1:
            raise self.refusal(key, "is less than 1", "Correct it")
        return value

    def text(self, key: str) -> str | None:
        """Return a string."""
        found: str | None = self._typed(key, "a string", lambda value: isinstance(value, str))
        return found

    def flag(self, key: str) -> bool | None:
        """Return true or false."""
        found: bool | None = self._typed(key, "true or false", lambda value: isinstance(value, bool))
        return found

    def object(self, key: str) -> Mapping[str, Any] | None:
        """Return an object."""
        found: Mapping[str, Any] | None = self._typed(key, "an object", lambda value: isinstance(value, dict))
        return found

    def strings(self, key: str) -> Sequence[str]:
        """Return a list of strings, empty where there is none; one string is a list of itself."""
        value = self.values.get(key)
        if isinstance(value, str):
            return [value]
        kind = "a list of strings"
        found = self._typed(
            key, kind, lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value)
        )
        return found or []

    def only(self, known: Collection[str]) -> None:
        """Raise InvalidBundleError for a key that is none of these: it may change answers."""
        if unknown := sorted(set(self.values) - set(known)):
            raise self.refusal(unknown[0], "is not known to this release", "Remove it if it changes no answer")

    def refusal(self, key: str, problem: str, remedy: str) -> InvalidBundleError:
        """Return the error that names file, key, what is wrong with its value, and the remedy."""
        shown = json.dumps(self.values.get(key), ensure_ascii=False)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        return InvalidBundleError(f"{self.path}: {key} is {shown}, which {problem}. {remedy}.", field=key)

    def _typed(self, key: str, kind: str, fits: Any) -> Any:
        value = self.values.get(key)
        if value is not None and not fits(value):
            raise self.refusal(key, f"is not {kind}", "Correct it")
        return value


def read_json(path: Path, absent: object) -> object:
    """Return what a file holds. Raises InvalidBundleError for one that does not parse, or gives a key twice."""
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_without_twins)
    except FileNotFoundError:
        return absent
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidBundleError(f"{path} cannot be read: {error}. Fetch it again.", field=path.name) from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it gives the key {twin!r} twice")
    return found
