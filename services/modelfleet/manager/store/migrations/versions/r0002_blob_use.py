"""When a blob was last wanted: garbage collection spares those of late."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the time; none where only the blob's creation counts."""
    op.add_column("blobs", sa.Column("last_used_time", sa.DateTime(), nullable=True))
