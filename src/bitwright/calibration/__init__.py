"""Calibration data: from text to tokens, from tokens to segments."""
