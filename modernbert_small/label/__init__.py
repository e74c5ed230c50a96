"""Phase 4: the teacher's vectors for every text, reduced to the student's width."""
