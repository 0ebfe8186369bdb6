"""The fleet: several servers behind one address."""
