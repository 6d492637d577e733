"""What programs and people see of a backup: the fields for JSON, metrics, one screen."""
