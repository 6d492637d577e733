"""The way to a server: its address, a connection, a record until it is stored there."""
