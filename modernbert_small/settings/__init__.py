"""What a recipe may say: the settings of the five scripts, and how they are read and checked."""
