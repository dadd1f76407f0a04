"""Text as token shards and batches: preparing, reading, and the order of samples, independent of the arrangement."""
