"""From a recipe to a run that is checked and ready."""
