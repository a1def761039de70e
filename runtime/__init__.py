"""Bundle to picture: prompt, noise, schedule, guidance and the loop, in numpy. Never imports torch."""
