"""Training in two stages: what the encoders and the teacher give is made once by a bundle's engines; then training."""
