"""Pictures to a LoRA."""
