"""Phase 2: the student's first weights from a large ModernBERT."""
