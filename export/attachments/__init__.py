"""What rewrites a plan before its graph is assembled: plan to plan, the given one stays as it is."""
