"""Blobs, models, their versions with files, aliases, and the revision of the assignment."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create all tables."""
    name = sa.String(63).with_variant(sa.String(63, collation="C"), "postgresql")
    path = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    sha256 = sa.String(64)
    op.create_table(
        "blobs",
        sa.Column("sha256", sha256, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("create_time", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_blobs"),
    )
    op.create_table(
        "models",
        sa.Column("model", name, nullable=False),
        sa.Column("last_model_version", sa.BigInteger(), nullable=False),
        sa.Column("create_time", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("model", name="pk_models"),
    )
    op.create_table(
        "model_versions",
        sa.Column("model", name, nullable=False),
        sa.Column("model_version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("bundle_digest", sha256, nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("manifest_json", sa.Text(), nullable=False),
        sa.Column("create_time", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["models.model"], name="fk_model_versions_model_models"),
        sa.PrimaryKeyConstraint("model", "model_version", name="pk_model_versions"),
        sa.UniqueConstraint("model", "bundle_digest", name="uq_model_versions_model_bundle_digest"),
    )
    op.create_table(
        "bundle_files",
        sa.Column("model", name, nullable=False),
        sa.Column("model_version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("path", path, nullable=False),
        sa.Column("sha256", sha256, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model", "model_version"],
            ["model_versions.model", "model_versions.model_version"],
            name="fk_bundle_files_model_model_version_model_versions",
        ),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name="fk_bundle_files_sha256_blobs"),
        sa.PrimaryKeyConstraint("model", "model_version", "path", name="pk_bundle_files"),
    )
    op.create_index("ix_bundle_files_sha256", "bundle_files", ["sha256"])
    op.create_table(
        "aliases",
        sa.Column("model", name, nullable=False),
        sa.Column("alias", name, nullable=False),
        sa.Column("model_version", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model", "model_version"],
            ["model_versions.model", "model_versions.model_version"],
            name="fk_aliases_model_model_version_model_versions",
        ),
        sa.PrimaryKeyConstraint("model", "alias", name="pk_aliases"),
    )
    revisions = op.create_table(
        "assignment_revision",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_assignment_revision"),
    )
    # Workers ignore revisions older than the one they have, which they keep on disk. Counting from the time lets them
    # take the assignments of a database that was made anew.
    op.bulk_insert(revisions, [{"id": 1, "revision": int(time.time())}])
