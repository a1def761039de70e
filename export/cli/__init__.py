"""``zimg-export``: options in, text or JSON out; the work is in the other rooms."""
