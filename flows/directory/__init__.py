"""What a campaign keeps on disk while it runs: files, the lock, signs of life."""
