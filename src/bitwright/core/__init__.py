"""The vocabulary: plain data and arithmetic. No files, no models."""
