"""What a bundle gives to others: a checkpoint in their formats, and itself on a hub."""
