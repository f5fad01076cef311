"""Text to tokens to calibration segments."""
