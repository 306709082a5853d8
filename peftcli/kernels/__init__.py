"""What makes a run fast, each computation with its plain reference beside it."""
