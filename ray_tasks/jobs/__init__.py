"""Plain functions of `merging` as tasks of the cluster."""
