"""Image encoders: what an image-to-video model is told about its picture beside the latents."""
