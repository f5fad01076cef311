"""Calibration data: text to tokens to segments."""
