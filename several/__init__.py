"""Several destinations of one backup: what they hold, and how one is brought up to date."""
