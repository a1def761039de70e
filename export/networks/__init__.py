"""The networks, in a form that traces well, and which family has which."""
