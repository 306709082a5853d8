"""What a model may learn: one file for each task, from the batch to the metrics."""
