"""A pool in shards over the cluster, and how what they merge reaches evaluators."""
