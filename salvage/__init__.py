"""Backups out of raw blocks: what a dying disk, or a deleted file, still holds."""
