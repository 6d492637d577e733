"""The node's side: its directory, its database, and a new one from a backup."""
