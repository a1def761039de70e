"""``zimg-run``: one file for each command."""
