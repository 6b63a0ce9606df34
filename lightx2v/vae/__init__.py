"""Video autoencoders: pixels <-> latents, one network a file."""
