"""The five decisions, how they are taken and how they are applied: transform, outliers, axis, range, rounding."""
