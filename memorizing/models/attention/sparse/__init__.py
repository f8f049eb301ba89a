"""Attention within a segment to few of its positions: by place, by hash, by cluster, or sorted."""
