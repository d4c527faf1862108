"""Rollouts, what workers report, and who leads."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    name = sa.String(63).with_variant(sa.String(63, collation="C"), "postgresql")
    text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "rollouts",
        sa.Column("rollout", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("model", name, nullable=False),
        sa.Column("alias", name, nullable=False),
        sa.Column("model_version", sa.BigInteger(), nullable=False),
        sa.Column("old_model_version", sa.BigInteger(), nullable=False),
        sa.Column("spec_json", sa.Text(), nullable=False),
        sa.Column("state", name, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("baseline_json", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("rollout", name="pk_rollouts"),
    )
    op.create_index("ix_rollouts_model_alias", "rollouts", ["model", "alias"])
    op.create_index("ix_rollouts_state", "rollouts", ["state"])
    op.create_table(
        "rollout_events",
        sa.Column("rollout", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("state", name, nullable=False),
        sa.Column("percent", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("time", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["rollout"], ["rollouts.rollout"], name="fk_rollout_events_rollout_rollouts"),
        sa.PrimaryKeyConstraint("rollout", "number", name="pk_rollout_events"),
    )
    op.create_table(
        "workers",
        sa.Column("worker", text, nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("versions_json", sa.Text(), nullable=False),
        sa.Column("report_count", sa.BigInteger(), nullable=False),
        sa.Column("report_time", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("worker", name="pk_workers"),
    )
    op.create_table(
        "leases",
        sa.Column("lease", name, nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("renewals", sa.BigInteger(), nullable=False),
        sa.Column("duration_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("lease", name="pk_leases"),
    )
