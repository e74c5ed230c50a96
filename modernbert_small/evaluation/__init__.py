"""How good a student is: evaluation sets, metrics, and the account of the student against its teacher."""
