"""The way to a backup in a PostgreSQL cluster, and what is there."""
