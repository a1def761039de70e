"""What is special about each family on the host side."""
