"""The tables. A change here needs a migration beside it; a test compares the two."""

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, foreign, mapped_column, relationship


class UtcDateTime(TypeDecorator[datetime]):
    """Times with their zone. SQLite keeps none, so UTC is what is kept."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time in UTC, without a zone."""
        del dialect
        return value and value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time in UTC, with its zone."""
        del dialect
        return value and value.replace(tzinfo=UTC)


# SQLite orders text by code point; without this PostgreSQL would order by its locale.
_NAME = String(63).with_variant(String(63, collation="C"), "postgresql")
_PATH = Text().with_variant(Text(collation="C"), "postgresql")
_SHA256 = String(64)


class Table(DeclarativeBase):
    """What all tables share."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, int: BigInteger, str: Text}  # noqa: RUF012  SQLAlchemy reads it as is


class BlobRow(Table):
    """
    A blob whose bytes are stored, whole and with this hash. What has no row here does not exist.

    `last_used_time` is when a push last asked for it or a version that has it was deleted.
    """

    __tablename__ = "blobs"

    sha256: Mapped[str] = mapped_column(_SHA256, primary_key=True)
    size: Mapped[int]
    create_time: Mapped[datetime]
    last_used_time: Mapped[datetime | None]


class ModelRow(Table):
    """
    A model. It stays when its last version is deleted, so that numbers are never used again.

    `pools_json` lists the pools that serve it, none for all.
    """

    __tablename__ = "models"

    model: Mapped[str] = mapped_column(_NAME, primary_key=True)
    last_model_version: Mapped[int]
    create_time: Mapped[datetime]
    pools_json: Mapped[str] = mapped_column(default="[]", server_default="[]")


class ModelVersionRow(Table):
    """A model version. `task` repeats the manifest's."""

    __tablename__ = "model_versions"
    __table_args__ = (UniqueConstraint("model", "bundle_digest"),)

    model: Mapped[str] = mapped_column(_NAME, ForeignKey(ModelRow.model), primary_key=True)
    model_version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    bundle_digest: Mapped[str] = mapped_column(_SHA256)
    task: Mapped[str]
    manifest_json: Mapped[str]
    create_time: Mapped[datetime]
    files: Mapped[list["BundleFileRow"]] = relationship(
        order_by="BundleFileRow.path", cascade="all, delete-orphan", lazy="selectin"
    )


class BundleFileRow(Table):
    """A file of a model version."""

    __tablename__ = "bundle_files"
    __table_args__ = (
        ForeignKeyConstraint(["model", "model_version"], [ModelVersionRow.model, ModelVersionRow.model_version]),
    )

    model: Mapped[str] = mapped_column(_NAME, primary_key=True)
    model_version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    path: Mapped[str] = mapped_column(_PATH, primary_key=True)
    sha256: Mapped[str] = mapped_column(_SHA256, ForeignKey(BlobRow.sha256), index=True)
    size: Mapped[int]


class AliasRow(Table):
    """Where an alias points."""

    __tablename__ = "aliases"
    __table_args__ = (
        ForeignKeyConstraint(["model", "model_version"], [ModelVersionRow.model, ModelVersionRow.model_version]),
    )

    model: Mapped[str] = mapped_column(_NAME, primary_key=True)
    alias: Mapped[str] = mapped_column(_NAME, primary_key=True)
    model_version: Mapped[int]


class AssignmentRevisionRow(Table):
    """One row: the revision of the assignment. Whoever changes the registry holds it locked."""

    __tablename__ = "assignment_revision"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    revision: Mapped[int]


class RolloutRow(Table):
    """
    A rollout. What it names may be deleted once it is over, so it refers to nothing.

    `revision` is that of the assignment when the present state, or step of the canary, was entered; `baseline_json`
    holds what each worker had answered by then.
    """

    __tablename__ = "rollouts"
    __table_args__ = (Index("ix_rollouts_model_alias", "model", "alias"),)

    rollout: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    model: Mapped[str] = mapped_column(_NAME)
    alias: Mapped[str] = mapped_column(_NAME)
    model_version: Mapped[int]
    old_model_version: Mapped[int]
    spec_json: Mapped[str]
    state: Mapped[str] = mapped_column(_NAME, index=True)
    step: Mapped[int]
    revision: Mapped[int]
    baseline_json: Mapped[str]
    owner: Mapped[ModelRow] = relationship(
        primaryjoin=lambda: foreign(RolloutRow.model) == ModelRow.model, viewonly=True, lazy="joined"
    )
    events: Mapped[list["RolloutEventRow"]] = relationship(
        order_by="RolloutEventRow.number", cascade="all, delete-orphan", lazy="selectin"
    )


class RolloutEventRow(Table):
    """A state that a rollout has entered, or a step of its canary."""

    __tablename__ = "rollout_events"

    rollout: Mapped[int] = mapped_column(ForeignKey(RolloutRow.rollout), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(_NAME)
    percent: Mapped[int]
    reason: Mapped[str]
    time: Mapped[datetime]


class WorkerRow(Table):
    """The newest report of a worker. `report_count` tells that it is news; `report_time` is for people to read."""

    __tablename__ = "workers"

    worker: Mapped[str] = mapped_column(_PATH, primary_key=True)
    pool: Mapped[str]
    revision: Mapped[int]
    versions_json: Mapped[str]
    report_count: Mapped[int]
    report_time: Mapped[datetime]


class LeaseRow(Table):
    """Who leads. The holder counts `renewals` up; one that does not for `duration_s` seconds has lost it."""

    __tablename__ = "leases"

    lease: Mapped[str] = mapped_column(_NAME, primary_key=True)
    holder: Mapped[str]
    renewals: Mapped[int]
    duration_s: Mapped[float] = mapped_column(Double)
