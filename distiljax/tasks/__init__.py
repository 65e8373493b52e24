"""What models are worth and good for: evaluation, prediction, export."""
