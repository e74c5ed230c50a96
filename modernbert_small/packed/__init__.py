"""Text without padding: tokens on disk, packed batches, attention over them, and their Trainer."""
