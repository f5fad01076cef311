"""The five decisions, each with how it is applied: transform, outliers, axis, range, rounding."""
