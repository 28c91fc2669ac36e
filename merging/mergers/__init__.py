"""Running a method over a pool: in memory, to disk, in shards."""
