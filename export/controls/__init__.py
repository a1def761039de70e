"""ControlNets of a bundle: found, recognised, put beside its denoiser, and taken out again."""
