"""One backup, served to many clients: a client's connection, and who may write what."""
