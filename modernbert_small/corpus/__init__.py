"""Phase 1: sources in, one clean, deduplicated, shuffled corpus out."""
