"""The backup's file: its layouts, reading and writing it, what is known of its checks."""
