"""A second machine's database, in step with a backup, and how it takes the node's place."""
