"""Work beside the node, each in a process of its own: compaction, scrub; and upgrades."""
