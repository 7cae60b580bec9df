"""Oracle data influences and the relational data influence model (paper section 3)."""
