"""What the notebooks import: one small package, each idea in one place."""
