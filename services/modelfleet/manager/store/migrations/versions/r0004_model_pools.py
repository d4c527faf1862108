"""Which pools serve a model."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; every pool serves the models that there are."""
    op.add_column("models", sa.Column("pools_json", sa.Text(), server_default="[]", nullable=False))
