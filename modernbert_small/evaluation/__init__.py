"""How good a student is: evaluation sets, metrics, and its account against its teacher."""
