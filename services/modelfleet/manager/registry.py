"""The registry: which models there are, their numbered versions, and the aliases that move between versions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from modelfleet.bundle.bundle import Bundle
from modelfleet.bundle.reference import ModelReference, check_alias_name, check_model_name
from modelfleet.manager.aliases import check_free, next_revision, point, rollout_with
from modelfleet.manager.blobs import note_use, stored_sizes
from modelfleet.manager.models import (
    Alias,
    Model,
    ModelVersion,
    existing_model,
    existing_version,
    listed,
    pointed,
    to_model_version,
    to_models,
)
from modelfleet.manager.placement import check_pools, place
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import (
    AliasRow,
    BundleFileRow,
    ModelRow,
    ModelVersionRow,
)
from modelfleet.runtime.errors import (
    InvalidBundleError,
    InvalidInputError,
    StateConflictError,
)
from modelfleet.runtime.paging import Page, PageRequest

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Registration:
    """What a push came to: `created` is False when the model had the bundle as a version already."""

    model_version: ModelVersion
    created: bool


class Registry:
    """
    Reads and changes the registry. Blocking: call it from threads.

    `assignment_changed` is called, from whichever thread, after each change of what workers should serve.
    """

    def __init__(self, database: Database, assignment_changed: Callable[[], None]) -> None:
        self._database = database
        self._assignment_changed = assignment_changed

    def register(self, model: str, bundle: Bundle, alias: str | None, pools: Iterable[str] = ()) -> Registration:
        """
        Make a bundle the next version of a model, point an alias at it, and place the model, in one transaction.

        Without `pools` it stays where it is. Raises InvalidInputError for bad names, StateConflictError when a blob is
        missing or a rollout is in the way, and InvalidBundleError when a blob has another size than the bundle says.
        """
        check_model_name(model)
        if alias is not None:
            check_alias_name(alias)
        wanted = check_pools(pools)
        with self._database.writing() as session:
            if alias is not None:
                check_free(session, model, alias)
            version = session.scalar(select(ModelVersionRow).filter_by(model=model, bundle_digest=bundle.digest))
            created = version is None
            if version is None:
                _check_blobs(session, bundle)
                version = _next_version(session, model, bundle)
            moved = alias is not None and point(session, model, alias, version.model_version)
            if wanted:
                moved |= place(session, existing_model(session, model), wanted)
            registration = Registration(to_model_version(version), created)
        number = registration.model_version.model_version
        _log.info("model version registered", model=model, model_version=number, alias=alias, created=created)
        if moved:
            self._assignment_changed()
        return registration

    def model(self, name: str) -> Model:
        """Return a model. Raises ModelNotFoundError."""
        check_model_name(name)
        with self._database.reading() as session:
            return to_models(session, [existing_model(session, name)])[0]

    def models(self, page: PageRequest) -> Page[Model]:
        """Return a page of models ordered by name. Raises InvalidInputError for a bad page."""
        limit, after = page.limit, page.after("models")
        with self._database.reading() as session:
            rows = session.scalars(
                select(ModelRow).where(ModelRow.model > (after or "")).order_by(ModelRow.model).limit(limit + 1)
            )
            return Page.cut(to_models(session, rows.all()), limit, "models", lambda model: model.model)

    def model_version(self, reference: ModelReference) -> ModelVersion:
        """Return the version that a reference names. Raises NotFoundErrors that name what there is instead."""
        with self._database.reading() as session:
            number = reference.model_version or pointed(session, reference.model, reference.alias or "")
            return to_model_version(existing_version(session, reference.model, number))

    def model_versions(self, model: str, page: PageRequest) -> Page[ModelVersion]:
        """Return a page of a model's versions, newest first. Raises ModelNotFoundError, InvalidInputError."""
        check_model_name(model)
        listing = f"model_versions of {model}"
        limit, before = page.limit, page.after_number(listing)
        with self._database.reading() as session:
            existing_model(session, model)
            query = select(ModelVersionRow).filter_by(model=model).order_by(ModelVersionRow.model_version.desc())
            if before is not None:
                query = query.where(ModelVersionRow.model_version < before)
            versions = [to_model_version(row) for row in session.scalars(query.limit(limit + 1))]
            return Page.cut(versions, limit, listing, lambda version: version.model_version)

    def delete_model_version(self, model: str, model_version: int) -> None:
        """Delete a version; its number is never used again. Raises StateConflictError while something names it."""
        check_model_name(model)
        _check_number(model_version)
        with self._database.writing() as session:
            row = existing_version(session, model, model_version)
            if (rollout := rollout_with(session, model, model_version)) is not None:
                raise StateConflictError(
                    f"Model {model!r} version {model_version} cannot be deleted: it is under rollout {rollout}. "
                    "Abort that, or wait until it is over."
                )
            if aliases := _aliases_of(session, model, model_version):
                raise StateConflictError(
                    f"Model {model!r} version {model_version} cannot be deleted: {listed(aliases)} of the model "
                    "names it. Point the alias at another version or delete it first."
                )
            note_use(session, (file.sha256 for file in row.files))
            session.delete(row)
        _log.info("model version deleted", model=model, model_version=model_version)

    def set_alias(self, model: str, alias: str, model_version: int) -> Alias:
        """Point an alias at a version, whether or not it exists. Raises what `existing_version` and `check_free` do."""
        check_model_name(model)
        check_alias_name(alias)
        _check_number(model_version)
        with self._database.writing() as session:
            existing_version(session, model, model_version)
            check_free(session, model, alias)
            moved = point(session, model, alias, model_version)
        _log.info("alias set", model=model, alias=alias, model_version=model_version, moved=moved)
        if moved:
            self._assignment_changed()
        return Alias(alias, model_version)

    def place(self, model: str, pools: Iterable[str]) -> Model:
        """Let some pools alone serve a model, or all where none is given. Raises as `placement` says."""
        check_model_name(model)
        wanted = check_pools(pools)
        with self._database.writing() as session:
            row = existing_model(session, model)
            moved = place(session, row, wanted)
            placed = to_models(session, [row])[0]
        _log.info("model placed", model=model, pools=wanted, moved=moved)
        if moved:
            self._assignment_changed()
        return placed

    def delete_alias(self, model: str, alias: str) -> None:
        """Delete an alias. Raises AliasNotFoundError, and StateConflictError while a rollout has it."""
        check_model_name(model)
        check_alias_name(alias)
        with self._database.writing() as session:
            pointed(session, model, alias)
            check_free(session, model, alias)
            session.delete(session.get_one(AliasRow, (model, alias)))
            next_revision(session)
        _log.info("alias deleted", model=model, alias=alias)
        self._assignment_changed()


def _check_blobs(session: Session, bundle: Bundle) -> None:
    sizes = stored_sizes(session, (file.sha256 for file in bundle.files))
    for file in bundle.files:
        if file.sha256 not in sizes:
            raise StateConflictError(
                f"The blob of {file.path!r}, {file.sha256}, is neither stored nor was it sent. "
                "Ask FindMissingBlobs what to send and push again."
            )
        if sizes[file.sha256] != file.size:
            raise InvalidBundleError(
                f"{file.path!r} is announced with {file.size} bytes, but its blob {file.sha256} has "
                f"{sizes[file.sha256]}. Give the size of the file.",
                field="files",
            )


def _next_version(session: Session, model: str, bundle: Bundle) -> ModelVersionRow:
    now = datetime.now(UTC)
    owner = session.get(ModelRow, model)
    if owner is None:
        owner = ModelRow(model=model, last_model_version=0, create_time=now)
        session.add(owner)
    owner.last_model_version += 1
    session.flush()
    version = ModelVersionRow(
        model=model,
        model_version=owner.last_model_version,
        bundle_digest=bundle.digest,
        task=bundle.manifest.task.value,
        manifest_json=bundle.manifest.to_json(),
        create_time=now,
        files=[BundleFileRow(path=file.path, sha256=file.sha256, size=file.size) for file in bundle.files],
    )
    session.add(version)
    session.flush()
    return version


def _aliases_of(session: Session, model: str, model_version: int) -> list[str]:
    query = select(AliasRow.alias).filter_by(model=model, model_version=model_version).order_by(AliasRow.alias)
    return list(session.scalars(query))


def _check_number(model_version: int) -> None:
    if model_version < 1:
        raise InvalidInputError(
            f"model_version is {model_version}. Give the number of a version, 1 or more.", field="model_version"
        )
