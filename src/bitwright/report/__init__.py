"""Results as people look at them: tables and progress."""
