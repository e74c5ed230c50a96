"""Phase 3: masked language modelling."""
