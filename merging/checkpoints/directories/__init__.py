"""Model directories as they are written: layout, the files beside the weights, what an earlier merge left."""
