"""The base model: where it lies, how it is loaded, and the task around it."""
