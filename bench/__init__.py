"""Speed and memory as ratios: ``python -m bench`` runs all, ``python -m bench NAME`` one."""
