"""What a bundle is worth: held against its checkpoint, and what its precision costs."""
