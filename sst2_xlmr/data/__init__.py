"""Files to rows, rows to ids, ids to global batches."""
