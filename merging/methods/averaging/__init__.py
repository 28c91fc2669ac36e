"""One weighted sum of the members' weights or task vectors."""
