"""How rows of one sequence exchange information: attention."""
