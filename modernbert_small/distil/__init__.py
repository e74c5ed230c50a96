"""Phase 5: training the student on the teacher's vectors."""
