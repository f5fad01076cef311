"""What each engine runs."""
