"""Check a bundle against its checkpoint, and measure the errors that its precision causes."""
