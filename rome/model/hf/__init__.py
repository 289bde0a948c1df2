"""Read and write Hugging Face checkpoints of the model."""
