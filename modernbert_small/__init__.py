"""What the five scripts share, and the mathematics. Nothing happens at import."""
