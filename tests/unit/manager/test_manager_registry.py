import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.bundle.reference import ModelReference
from modelfleet.manager.registry import Registry
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import AssignmentRevisionRow, BlobRow
from modelfleet.runtime.errors import (
    AliasNotFoundError,
    InvalidBundleError,
    ModelVersionNotFoundError,
    StateConflictError,
)
from modelfleet.runtime.paging import PageRequest
from sqlalchemy import select


def bundle(content: str, size: int = 1) -> Bundle:
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return Bundle((BundleFile("model.onnx", sha256, size),), Manifest(task=Task.TENSOR, model="model.onnx"))


def store_blobs(database: Database, *contents: str) -> None:
    with database.writing() as session:
        for content in contents:
            session.add(BlobRow(sha256=bundle(content).files[0].sha256, size=1, create_time=datetime.now(UTC)))


def revision(database: Database) -> int:
    with database.reading() as session:
        return session.execute(select(AssignmentRevisionRow.revision)).scalar_one()


def test_versions_registered_at_once_get_numbers_from_one_on_without_gaps(
    database: Database, registry: Registry
) -> None:
    contents = [str(number) for number in range(40)]
    store_blobs(database, *contents)

    with ThreadPoolExecutor(8) as threads:
        registrations = list(threads.map(lambda content: registry.register("m", bundle(content), "stable"), contents))

    assert sorted(done.model_version.model_version for done in registrations) == list(range(1, 41))
    assert len(registry.model_versions("m", PageRequest(1000)).items) == 40


def test_one_bundle_registered_at_once_becomes_one_version(database: Database, registry: Registry) -> None:
    store_blobs(database, "a")

    with ThreadPoolExecutor(8) as threads:
        registrations = list(threads.map(lambda _: registry.register("m", bundle("a"), None), range(20)))

    assert {done.model_version.model_version for done in registrations} == {1}
    assert sum(done.created for done in registrations) == 1


def test_registration_without_its_blob_changes_nothing(database: Database, registry: Registry) -> None:
    before = revision(database)
    with pytest.raises(StateConflictError, match=r"blob of 'model\.onnx'"):
        registry.register("m", bundle("a"), "stable")
    assert registry.models(PageRequest()).items == ()
    assert revision(database) == before


def test_registration_with_a_wrong_size_is_refused(database: Database, registry: Registry) -> None:
    store_blobs(database, "a")
    with pytest.raises(InvalidBundleError, match="announced with 2 bytes"):
        registry.register("m", bundle("a", size=2), None)


def test_bundle_that_was_deleted_gets_a_new_number(database: Database, registry: Registry) -> None:
    store_blobs(database, "a")
    registry.register("m", bundle("a"), None)
    registry.delete_model_version("m", 1)

    again = registry.register("m", bundle("a"), None)

    assert again.created
    assert again.model_version.model_version == 2


def test_model_stays_when_its_last_version_is_deleted(database: Database, registry: Registry) -> None:
    store_blobs(database, "a")
    registry.register("m", bundle("a"), None)
    registry.delete_model_version("m", 1)

    model = registry.model("m")

    assert (model.latest_model_version, model.task, model.aliases) == (0, "", ())
    with pytest.raises(ModelVersionNotFoundError, match="it has none"):
        registry.model_version(ModelReference.parse("m@1"))


def test_models_are_listed_by_code_point_whatever_the_database_sorts_by(database: Database, registry: Registry) -> None:
    names = ["a", "a-b", "a.b", "a0", "a_c", "aa", "b"]
    store_blobs(database, "a")
    for name in reversed(names):
        registry.register(name, bundle("a"), None)

    pages, token = [], ""
    while page := registry.models(PageRequest(2, token)):
        pages += [model.model for model in page.items]
        if not (token := page.next_token):
            break

    assert pages == names == sorted(names)


def test_times_have_their_zone(database: Database, registry: Registry) -> None:
    store_blobs(database, "a")
    created = registry.register("m", bundle("a"), None).model_version.create_time
    assert created.tzinfo is UTC
    assert abs((datetime.now(UTC) - created).total_seconds()) < 60
    assert registry.model("m").create_time == created


def test_watchers_are_called_only_when_an_assignment_changed(database: Database) -> None:
    calls: list[int] = []
    registry = Registry(database, lambda: calls.append(revision(database)))
    store_blobs(database, "a", "b")
    start = revision(database)

    registry.register("m", bundle("a"), None)
    registry.register("m", bundle("a"), "stable")
    registry.register("m", bundle("a"), "stable")
    registry.set_alias("m", "stable", 1)
    registry.register("m", bundle("b"), None)
    registry.set_alias("m", "stable", 2)
    registry.delete_model_version("m", 1)
    registry.delete_alias("m", "stable")

    assert calls == [start + 1, start + 2, start + 3]


CONTENTS = ("a", "b", "c", "d")
MODELS = st.sampled_from(("m", "n"))
ALIASES = st.sampled_from(("stable", "canary"))


class RegistryMachine(RuleBasedStateMachine):
    """The registry does what dictionaries would do, and its revision tells of each change of the aliases."""

    def __init__(self, new_database: Callable[[], Database]) -> None:
        super().__init__()
        self.new_database = new_database

    @initialize()
    def start(self) -> None:
        self.database = self.new_database()
        store_blobs(self.database, *CONTENTS)
        self.registry = Registry(self.database, lambda: None)
        self.versions: dict[tuple[str, int], str] = {}
        self.numbers = {"m": 0, "n": 0}
        self.aliases: dict[tuple[str, str], int] = {}
        self.seen = (revision(self.database), dict(self.aliases))

    @rule(model=MODELS, content=st.sampled_from(CONTENTS), alias=st.none() | ALIASES)
    def register(self, model: str, content: str, alias: str | None) -> None:
        done = self.registry.register(model, bundle(content), alias)
        known = [number for (owner, number), held in self.versions.items() if (owner, held) == (model, content)]
        assert done.created is not bool(known)
        number = done.model_version.model_version
        if done.created:
            self.numbers[model] += 1
        assert number == (known[0] if known else self.numbers[model])
        self.versions[model, number] = content
        if alias:
            self.aliases[model, alias] = number

    @rule(model=MODELS, alias=ALIASES, number=st.integers(1, 6))
    def set_alias(self, model: str, alias: str, number: int) -> None:
        if (model, number) in self.versions:
            self.registry.set_alias(model, alias, number)
            self.aliases[model, alias] = number
        elif self.numbers[model]:
            with pytest.raises(ModelVersionNotFoundError):
                self.registry.set_alias(model, alias, number)

    @rule(model=MODELS, alias=ALIASES)
    def delete_alias(self, model: str, alias: str) -> None:
        if (model, alias) in self.aliases:
            self.registry.delete_alias(model, alias)
            del self.aliases[model, alias]
        elif self.numbers[model]:
            with pytest.raises(AliasNotFoundError):
                self.registry.delete_alias(model, alias)

    @rule(model=MODELS, number=st.integers(1, 6))
    def delete_version(self, model: str, number: int) -> None:
        if any(target == (model, number) for target in ((owner, held) for (owner, _), held in self.aliases.items())):
            with pytest.raises(StateConflictError):
                self.registry.delete_model_version(model, number)
        elif self.versions.pop((model, number), None):
            self.registry.delete_model_version(model, number)

    @invariant()
    def revision_grows_exactly_when_aliases_change(self) -> None:
        if hasattr(self, "seen"):
            now, before = revision(self.database), self.seen
            assert (now > before[0]) == (self.aliases != before[1])
            assert now >= before[0]
            self.seen = (now, dict(self.aliases))

    @invariant()
    def lists_tell_what_there_is(self) -> None:
        if hasattr(self, "versions"):
            models = self.registry.models(PageRequest()).items
            assert {(model.model, alias.alias): alias.model_version for model in models for alias in model.aliases} == (
                self.aliases
            )
            for model in models:
                held = [
                    version.model_version for version in self.registry.model_versions(model.model, PageRequest()).items
                ]
                assert held == sorted((number for owner, number in self.versions if owner == model.model), reverse=True)
                assert model.latest_model_version == max(held, default=0)


def test_registry_does_what_dictionaries_would_do(new_database: Callable[[], Database]) -> None:
    run_state_machine_as_test(
        lambda: RegistryMachine(new_database), settings=settings(max_examples=10, stateful_step_count=25, deadline=None)
    )
