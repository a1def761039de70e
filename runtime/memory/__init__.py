"""What memory there is, what a picture takes, and how it fits: engines that stay open, tiles."""
