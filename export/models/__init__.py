"""The networks in plain torch, written to be traced; state-dict names are the checkpoints' own."""
