"""Text encoders: prompts to conditioning."""
