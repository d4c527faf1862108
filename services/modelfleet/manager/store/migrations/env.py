"""What Alembic runs around the migrations. `Database.migrate` gives the connection."""

from alembic import context

from modelfleet.manager.store.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite alters tables by copying them
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
