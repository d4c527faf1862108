"""Models, their versions and aliases, as the database has them."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from modelfleet.bundle.bundle import BundleFile
from modelfleet.manager.placement import pools_of
from modelfleet.manager.store.tables import AliasRow, ModelRow, ModelVersionRow
from modelfleet.runtime.errors import AliasNotFoundError, ModelNotFoundError, ModelVersionNotFoundError

_NAMED_IN_ERRORS = 10


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A model version as it was registered. `manifest_json` is canonical; files are ordered by path."""

    model: str
    model_version: int
    bundle_digest: str
    manifest_json: str
    files: tuple[BundleFile, ...]
    create_time: datetime


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable name for a version."""

    alias: str
    model_version: int


@dataclass(frozen=True, slots=True)
class Model:
    """
    A model. `latest_model_version` is 0 and `task` empty when all versions were deleted. Aliases by name.

    `pools` are those that serve it, none for all.
    """

    model: str
    aliases: tuple[Alias, ...]
    latest_model_version: int
    task: str
    create_time: datetime
    pools: tuple[str, ...]


def to_model_version(row: ModelVersionRow) -> ModelVersion:
    """Return the version of a row. Its digest is never computed again: the defaults of manifests change with time."""
    files = tuple(BundleFile(file.path, file.sha256, file.size) for file in row.files)
    return ModelVersion(row.model, row.model_version, row.bundle_digest, row.manifest_json, files, row.create_time)


def to_models(session: Session, rows: Iterable[ModelRow]) -> list[Model]:
    """Return the models of rows, in their order."""
    rows = list(rows)
    names = [row.model for row in rows]
    aliases: dict[str, list[Alias]] = {name: [] for name in names}
    for alias in session.scalars(select(AliasRow).where(AliasRow.model.in_(names)).order_by(AliasRow.alias)):
        aliases[alias.model].append(Alias(alias.alias, alias.model_version))
    newest = (
        select(ModelVersionRow.model, func.max(ModelVersionRow.model_version).label("model_version"))
        .where(ModelVersionRow.model.in_(names))
        .group_by(ModelVersionRow.model)
        .subquery()
    )
    latest = {
        model: (number, task)
        for model, number, task in session.execute(
            select(ModelVersionRow.model, ModelVersionRow.model_version, ModelVersionRow.task).join(
                newest,
                (ModelVersionRow.model == newest.c.model) & (ModelVersionRow.model_version == newest.c.model_version),
            )
        )
    }
    return [
        Model(row.model, tuple(aliases[row.model]), *latest.get(row.model, (0, "")), row.create_time, pools_of(row))
        for row in rows
    ]


def existing_model(session: Session, model: str) -> ModelRow:
    """Return the row of a model. Raises ModelNotFoundError that names what there is."""
    row = session.get(ModelRow, model)
    if row is None:
        names = session.scalars(select(ModelRow.model).order_by(ModelRow.model).limit(_NAMED_IN_ERRORS + 1)).all()
        there = f"there is {listed(names)}" if names else "there is none yet; push one"
        raise ModelNotFoundError(f"No model {model!r} is registered; {there}.", field="model")
    return row


def existing_version(session: Session, model: str, model_version: int) -> ModelVersionRow:
    """Return the row of a version. Raises ModelNotFoundError and ModelVersionNotFoundError that name what there is."""
    row = session.get(ModelVersionRow, (model, model_version))
    if row is None:
        existing_model(session, model)
        numbers = session.scalars(
            select(ModelVersionRow.model_version)
            .filter_by(model=model)
            .order_by(ModelVersionRow.model_version.desc())
            .limit(_NAMED_IN_ERRORS + 1)
        )
        raise ModelVersionNotFoundError(
            f"Model {model!r} has no version {model_version}; it has {listed(numbers)}.", field="model_version"
        )
    return row


def pointed(session: Session, model: str, alias: str) -> int:
    """Return the version that an alias names. Raises AliasNotFoundError, ModelNotFoundError."""
    row = session.get(AliasRow, (model, alias))
    if row is None:
        existing_model(session, model)
        names = session.scalars(select(AliasRow.alias).filter_by(model=model).order_by(AliasRow.alias))
        raise AliasNotFoundError(f"Model {model!r} has no alias {alias!r}; it has {listed(names)}.", field="alias")
    return row.model_version


def listed(values: Iterable[object]) -> str:
    """Return the first values for a sentence."""
    shown = [repr(value) for value in values]
    more = ["and others"] if len(shown) > _NAMED_IN_ERRORS else []
    return ", ".join(shown[:_NAMED_IN_ERRORS] + more) or "none"
