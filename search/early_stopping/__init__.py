"""Which candidates to give up before all examples are measured."""
